"""What engines and trainers agree by: the newest weights, and whose turn it is.

Without torch: the hub's own process and the replicas in front of the engines do not need it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

import ray
from ray import ObjectRef

MAX_EVENTS = 10_000
Part = Literal["weights", "kv_cache"]  # of an engine's memory


@dataclass(frozen=True)
class TensorSlice:
    """Where one weight lies in a bucket."""

    name: str  # as in the Hugging Face checkpoint
    dtype: str  # as in torch, e.g. "float32"
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


Bucket = tuple[list[TensorSlice], ObjectRef]


@dataclass(frozen=True)
class Event:
    """Something in the change of turns, by the hub's clock."""

    seconds: float
    who: str
    what: str


@dataclass(frozen=True)
class Publication:
    number: int  # counts publications: unlike the version, it never goes back
    version: int  # of the policy; without buckets it is that of the checkpoint which engines load
    buckets: list[Bucket]


class HubIsBlank(RuntimeError):
    """The hub's process died, and the trainers have not given the new one its state yet: ask again."""


class HubState(NamedTuple):
    """What a hub's process takes along when it dies."""

    publication: Publication  # the newest
    announced: tuple[int, int]  # number and version of the one that is being made, or of the newest
    engines_turn: bool = True


class WeightHub:
    """A small actor of the run that knows the newest version and keeps its buckets alive.

    Where engines and trainers have their memory by turns, it also knows whose turn it is. Started again after
    its process died it answers `HubIsBlank` until `restore`.
    """

    def __init__(self, *, checkpoint_version: int = 0) -> None:
        """`checkpoint_version`: -1 where the checkpoint is not yet the policy, whose version 0 is to come."""
        self.checkpoint_version = checkpoint_version
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.state: HubState | None = None if self._is_restarted() else self._first(0)

    def _is_restarted(self) -> bool:
        if not ray.is_initialized():
            return False
        context = ray.get_runtime_context()
        # Outside an actor the question is an error.
        return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)

    def _first(self, number: int) -> HubState:
        """Nothing has been published; `number` counts from there."""
        version = self.checkpoint_version
        return HubState(Publication(number, version, []), (number - version, 0))

    def restore(self, state: HubState | None) -> None:
        """From the trainers that have set it; from ones that were themselves restarted meanwhile, None: then
        publications are numbered from above all that engines can hold, and the trainers push again.
        """
        if self.state is None:
            self.state = state or self._first(int(time.time() * 1000))
            self.record("hub", "its process died; the trainers have given it its state again")

    def ping(self) -> None:
        self.current()

    def current(self) -> HubState:
        if self.state is None:
            raise HubIsBlank("the weight hub's process died and has not got its state back yet")
        return self.state

    def announce(self, version: int) -> int:
        """The number of the publication that is to come. A lower version than before comes from a trainer
        that was restarted from its last checkpoint.
        """
        number = 1 + max(self.current().announced[0], self.newest().number)
        self.state = self.current()._replace(announced=(number, version))
        return number

    def publish(self, publication: Publication) -> None:
        self.state = self.current()._replace(publication=publication)

    def is_coming(self, version: int) -> bool:
        """Whether a publication of at least that version has been announced and is not here yet."""
        number, announced = self.current().announced
        return announced >= version and number > self.newest().number

    def newest(self) -> Publication:
        return self.current().publication

    def set_turn(self, engines: bool) -> None:
        self.state = self.current()._replace(engines_turn=engines)

    def is_engines_turn(self) -> bool:
        return self.current().engines_turn

    def record(self, who: str, what: str) -> None:
        self.events.append(Event(time.time(), who, what))

    def trace(self) -> list[Event]:
        """The newest events, in the order in which they arrived."""
        return list(self.events)
