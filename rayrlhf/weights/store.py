"""Actor that stores the latest published weights and whether trainer or engines own the GPU memory.

Imports no torch: neither the actor's process nor the Serve replicas of the engines need it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import ray
from ray import ObjectRef

from rayrlhf.placement.memory_turns import MemoryTurns, Stage, TurnsNotKnown

MAX_EVENTS = 10_000
Part = Literal["weights", "kv_cache"]  # part of an engine's memory


@dataclass(frozen=True)
class TensorSlice:
    """Name, type and position of one weight in a bucket."""

    name: str  # as in the Hugging Face checkpoint
    dtype: str  # as in torch, e.g. "float32"
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


Bucket = tuple[list[TensorSlice], ObjectRef]


@dataclass(frozen=True)
class AdapterSpec:
    """A push of a LoRA adapter alone: what engines need in addition to its tensors.

    Example: AdapterSpec(16, {"model.layers.0.self_attn.q_proj.lora_A.weight": 4711, …}).
    """

    rank: int
    checksums: dict[str, int]  # of every tensor, `weights.checksum`; B contains the scaling alpha / rank


@dataclass(frozen=True)
class Base:
    """All weights of a model that adapters are for, if they are not those of a checkpoint (QLoRA)."""

    number: int  # of the first publication with it
    buckets: list[Bucket]


@dataclass(frozen=True)
class Event:
    """A step in the handover of GPU memory between trainers and engines; time from the store's clock."""

    seconds: float
    who: str
    what: str


@dataclass(frozen=True)
class Publication:
    number: int  # counts publications: unlike the version, it never decreases
    version: int  # of the policy; without buckets, that of the checkpoint which engines load
    buckets: list[Bucket]
    adapter: AdapterSpec | None = None  # None: the buckets hold all weights
    base: Base | None = None  # of the adapter; None: the checkpoint that engines load
    verify: bool = False  # engines record what they receive, to be compared with the trainer's checksums


class StoreNotRestored(RuntimeError):
    """The store's process died and the trainers have not restored its state yet: try again."""


class StoreState(NamedTuple):
    """State that is lost when the store's process dies."""

    publication: Publication  # the latest
    announced: tuple[int, int]  # number and version of the pending publication, or of the latest
    engines_own_memory: bool = True


class WeightStore:
    """Actor that stores the latest published version and keeps its buckets alive.

    With colocated engines it also stores whether trainers or engines own the GPU memory. After its process
    died and Ray restarted it, its methods raise `StoreNotRestored` until `restore` is called.
    """

    def __init__(self, *, checkpoint_version: int = 0, num_engines: int = 1) -> None:
        """
        Args:
            num_engines: of the run.
            checkpoint_version: version of the checkpoint that engines load; -1 if the checkpoint is not yet
                the policy and version 0 is still to be published.
        """
        self.checkpoint_version = checkpoint_version
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.wanted = False  # an engine waits for what is announced
        is_restarted = self._is_restarted()
        self.state: StoreState | None = None if is_restarted else self._first(0)
        self.turns = MemoryTurns(num_engines, is_restarted=is_restarted)

    def _is_restarted(self) -> bool:
        if not ray.is_initialized():
            return False
        context = ray.get_runtime_context()
        # `was_current_actor_reconstructed` raises outside an actor.
        return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)

    def _first(self, number: int) -> StoreState:
        """State before the first publication; publications are counted from `number`."""
        version = self.checkpoint_version
        return StoreState(Publication(number, version, []), (number - version, 0))

    def restore(self, state: StoreState | None) -> None:
        """Restore the state after the store's process died.

        Args:
            state: what the trainers last set. None if the trainers were restarted too: then publications are
                numbered above any that engines can hold, and the trainers push again.
        """
        if self.state is None:
            self.state = state or self._first(int(time.time() * 1000))
            self.record("hub", "its process died; the trainers restored its state")

    def ping(self) -> None:
        self.current()

    def current(self) -> StoreState:
        if self.state is None:
            raise StoreNotRestored("the weight store's process died and its state has not been restored yet")
        return self.state

    def announce(self, version: int) -> int:
        """Announce a push; returns its number. A version that is not higher than the previous one is from a
        trainer that was restarted from its last checkpoint: what it had published is no longer the policy.
        """
        latest = self.latest()
        number = 1 + max(self.current().announced[0], latest.number)
        if version <= latest.version and latest.number > 0:
            latest = Publication(latest.number, -1, [])
        self.state = self.current()._replace(announced=(number, version), publication=latest)
        return number

    def publish(self, publication: Publication) -> None:
        self.state = self.current()._replace(publication=publication)

    def is_coming(self, version: int) -> bool:
        """Whether a publication of at least that version is announced but not published yet: an engine that
        asks needs it (`take_wanted`).
        """
        number, announced = self.current().announced
        is_coming = announced >= version and number > self.latest().number
        self.wanted = self.wanted or is_coming
        return is_coming

    def newest_version(self) -> int:
        """Of what has been pushed or published."""
        number, announced = self.current().announced
        return announced if number > self.latest().number else self.latest().version

    def take_wanted(self) -> bool:
        """Whether an engine has asked for what is announced since the last call."""
        self.current()
        wanted, self.wanted = self.wanted, False
        return wanted

    def latest(self) -> Publication:
        return self.current().publication

    def set_engines_own_memory(self, engines_own_memory: bool) -> None:
        self.state = self.current()._replace(engines_own_memory=engines_own_memory)

    def engines_own_memory(self) -> bool:
        return self.current().engines_own_memory

    # Of engines and of models that share GPUs with them: `placement.memory_turns`.

    def claim_turn(self, name: str, slots: Sequence[int], stage: Stage) -> bool:
        """`MemoryTurns.claim`, and False for engines while trainers own the memory."""
        if self.state is None:
            raise TurnsNotKnown("the weight store's state has not been restored yet")
        is_engine = stage == "starting"
        return (self.state.engines_own_memory or not is_engine) and self.turns.claim(name, slots, stage)

    def renew_turn(self, name: str, slots: Sequence[int], stage: Stage) -> None:
        self.turns.renew(name, slots, stage)

    def move_turn_to(self, name: str, stage: Stage, event: tuple[str, str] | None = None) -> None:
        """`event`: to be recorded as well, who and what."""
        self.turns.move_to(name, stage)
        if event is not None:
            self.record(*event)

    def end_turn(self, name: str) -> None:
        self.turns.end(name)

    def engines_up(self) -> dict[str, Stage]:
        return self.turns.engines_up()

    def record(self, who: str, what: str) -> None:
        self.events.append(Event(time.time(), who, what))

    def trace(self) -> list[Event]:
        """The latest events, in order of arrival."""
        return list(self.events)
