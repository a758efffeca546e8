"""Weights from the trainer to every engine, by version.

The trainer flattens its parameters into buckets of raw bytes, puts each into the object store and publishes
the list under a version number; replicas pull. So a replica that was down during a push gets the same
weights, by the same code, when it comes back, and one RPC moves a bucket, never a parameter.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from torch import Tensor, nn

from rayrlhf.rollout.bucket import TensorSlice

Part = Literal["weights", "kv_cache"]  # of an engine's memory
Bucket = tuple[list[TensorSlice], ObjectRef]
ALIGNMENT_BYTES = 16
MAX_EVENTS = 10_000
Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Event:
    """Something in the change of turns, by the hub's clock."""

    seconds: float
    who: str
    what: str


@dataclass(frozen=True)
class Publication:
    number: int  # counts publications: unlike the version, it never goes back
    version: int  # of the policy; 0 without buckets is the checkpoint that engines load by themselves
    buckets: list[Bucket]


class WeightHub:
    """A small actor of the run that knows the newest version and keeps its buckets alive.

    Where engines and trainers have their memory by turns, it also knows whose turn it is.
    """

    def __init__(self) -> None:
        self.newest_publication = Publication(0, 0, [])
        self.engines_turn = True
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def publish(self, version: int, buckets: list[Bucket]) -> None:
        """A lower version than before comes from a trainer that was restarted from its last checkpoint."""
        number = self.newest_publication.number + 1
        self.newest_publication = Publication(number, version, buckets)

    def newest(self) -> Publication:
        return self.newest_publication

    def set_turn(self, engines: bool) -> None:
        self.engines_turn = engines

    def is_engines_turn(self) -> bool:
        return self.engines_turn

    def record(self, who: str, what: str) -> None:
        self.events.append(Event(time.time(), who, what))

    def trace(self) -> list[Event]:
        """The newest events, in the order in which they arrived."""
        return list(self.events)


class WeightSync:
    """The trainer's end. `push` is collective: every rank gathers, rank 0 sends."""

    def __init__(
        self,
        hub: ActorHandle,
        engines: DeploymentHandle,
        *,
        rank: int,
        num_engines: int,
        bucket_bytes: int,
        timeout_seconds: float,
        gathered: Gathered,
    ) -> None:
        self.hub = hub
        self.engines = engines
        self.rank = rank
        self.num_engines = num_engines
        self.bucket_bytes = bucket_bytes
        self.timeout_seconds = timeout_seconds
        self.gathered = gathered

    def is_news(self, version: int) -> bool:
        """Whether the engines may hold anything else than this version, as after a restart of the trainer; or
        nothing, asleep.
        """
        newest: Any = ray.get(self.hub.newest.remote(), timeout=self.timeout_seconds)
        awake: Any = ray.get(self.hub.is_engines_turn.remote(), timeout=self.timeout_seconds)
        return version > 0 or newest.number > 0 or not awake

    def push(self, parameters: list[tuple[str, nn.Parameter]], version: int) -> None:
        """Publish and wait until every running engine holds `version`. Raises `TimeoutError` naming who
        does not.
        """
        buckets: list[Bucket] = []
        for group in plan_buckets(parameters, self.bucket_bytes):
            with self.gathered([parameter for _, parameter in group]):
                if self.rank == 0:
                    slices, flat = flatten(group)
                    buckets.append((slices, ray.put(flat.numpy())))
        if self.rank == 0:
            ray.get(self.hub.publish.remote(version, buckets), timeout=self.timeout_seconds)
            # Engines that are not running now, starting or dead, pull this version before they are healthy.
            self._tell_engines(f"weight sync of version {version}", "catch_up", version)

    def engines_sleep(self) -> int:
        """The trainers' turn: every running engine gives its memory up; returns the bytes, on rank 0.

        Engines that start meanwhile wait for their turn. Raises `TimeoutError` like `push`.
        """
        if self.rank > 0:
            return 0
        ray.get(self.hub.set_turn.remote(False), timeout=self.timeout_seconds)
        answers = self._tell_engines("putting the engines to sleep", "sleep")
        return sum(answer["freed_bytes"] for answer in answers)

    def engines_wake(self, part: Part) -> None:
        """The engines' turn, in two stages: `weights`, which are then to be pushed, and `kv_cache`."""
        if self.rank > 0:
            return
        if part == "weights":
            ray.get(self.hub.set_turn.remote(True), timeout=self.timeout_seconds)
        self._tell_engines(f"waking the engines' {part}", "wake", part)

    def record(self, what: str) -> None:
        """In the hub's trace, for rank 0."""
        if self.rank == 0:
            ray.get(self.hub.record.remote("trainers", what), timeout=self.timeout_seconds)

    def _tell_engines(self, what: str, method: str, *arguments: Any) -> list[dict[str, int]]:
        """The answers of the running engines. Raises `TimeoutError` naming those who did it."""
        try:
            answers: list[Any] = self.engines.broadcast(method, *arguments).results(
                timeout_s=self.timeout_seconds, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        failed = [a for a in answers if isinstance(a, BaseException) and not isinstance(a, RayActorError)]
        done = [a for a in answers if isinstance(a, dict)]
        if failed:
            raise TimeoutError(
                f"{what}: of {self.num_engines} engines only {sorted(a['replica'] for a in done)} did it "
                f"within {self.timeout_seconds:g} s; first failure: {failed[0]!r}"
            ) from failed[0]
        return done


def plan_buckets(
    parameters: list[tuple[str, nn.Parameter]], bucket_bytes: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Consecutive parameters up to `bucket_bytes`; one larger than that gets a bucket of its own."""
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if group and size + num_bytes > bucket_bytes:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += num_bytes
    if group:
        yield group


def flatten(group: list[tuple[str, nn.Parameter]]) -> tuple[list[TensorSlice], Tensor]:
    """The parameters' bytes in one new uint8 tensor on the CPU, and where each of them lies."""
    slices: list[TensorSlice] = []
    end = 0
    for name, parameter in group:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # a view of another dtype needs an aligned start
        num_bytes = parameter.numel() * parameter.element_size()
        dtype = str(parameter.dtype).removeprefix("torch.")
        slices.append(TensorSlice(name, dtype, tuple(parameter.shape), start, num_bytes))
        end = start + num_bytes
    flat = torch.empty(end, dtype=torch.uint8)
    for (_, parameter), piece in zip(group, slices, strict=True):
        raw = parameter.detach().contiguous().view(-1).view(torch.uint8)
        flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes].copy_(raw)
    return slices, flat
