"""Weights from the trainer to every engine, by version.

The trainer flattens its parameters into buckets of raw bytes, puts each into the object store and publishes
the list under a version number; replicas pull. So a replica that was down during a push gets the same
weights, by the same code, when it comes back. Where a faster way leads to the engines that are up, the
buckets take it first (`weights.direct`), and the published ones are for those who were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Literal

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from rayrlhf.models.checkpoint_tensors import CheckpointTensors
from rayrlhf.weights.buckets import Group, flatten, lay_out, plan_buckets
from rayrlhf.weights.direct import Courier
from rayrlhf.weights.store import Bucket, HubState, Part, Publication, TensorSlice
from rayrlhf.weights.store_client import HubClient
from rayrlhf.weights.transfer_group import Backend

COPIES_UNDER_WAY = 2  # buckets that wait to be put into the object store
Gathered = Callable[[list[Tensor]], AbstractContextManager[None]]


class WeightSync:
    """The trainer's end. Every method is collective: all ranks gather, some of them send."""

    def __init__(
        self,
        hub: ActorHandle,
        engines: DeploymentHandle,
        *,
        route: Backend | Literal["object_store"],
        rank: int,
        device: torch.device,
        num_engines: int,
        bucket_bytes: int,
        timeout_seconds: float,
        gathered: Gathered,
        gather: Callable[[list[Any]], list[Any]],
    ) -> None:
        """`gathered` makes partitioned parameters whole; `gather` joins the ranks' lists."""
        self.hub = HubClient(hub, timeout_seconds) if rank == 0 else None
        self.gather = gather
        self.engines = engines
        self.rank = rank
        self.num_engines = num_engines
        self.bucket_bytes = bucket_bytes
        self.timeout_seconds = timeout_seconds
        self.gathered = gathered
        self.courier: Courier | None = None
        if route != "object_store":
            self.courier = Courier(
                route,
                self._tell_engines,
                rank=rank,
                device=device,
                gather=gather,
                timeout_seconds=timeout_seconds,
            )
        self.copier = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self.publishing: Future[None] | None = None
        self.under_way: list[Future[Bucket]] = []

    def is_news(self, version: int) -> bool:
        """Whether the engines may hold anything else than this version, as after a restart of the trainer; or
        nothing, asleep.
        """
        found: list[HubState] = [] if self.hub is None else [self.hub.call("current")]
        newest, _, awake = self.gather(found)[0]
        return version > 0 or newest.number > 0 or newest.version < version or not awake

    def push(self, weights: Iterable[CheckpointTensors], version: int) -> str | None:
        """Every running engine holds `version` then. Returns why the direct way failed, where it did and the
        object store had to help. Raises `TimeoutError` naming who does not hold it.
        """
        plan = [(group, lay_out(group)) for group in plan_buckets(weights, self.bucket_bytes)]
        number = self._announce(version)
        courier = self.courier
        everybody = courier is not None and courier.start(number, version, [slices for _, slices in plan])
        copies: list[Future[Bucket]] = []
        for group, slices in plan:
            with self.gathered([part for made_together in group for part in made_together.parts]):
                flat = courier.send(group, slices) if courier is not None else None
                if self.rank == 0:
                    copies.append(self._copy(group, slices, flat))
        problem = courier.finish() if courier is not None else None
        if self.rank == 0:
            self.publishing = self.copier.submit(self._publish, number, version, copies)
            self.under_way = []
            if not everybody or problem is not None:
                self._wait_until_published()
                # Engines that are not running now, starting or dead, pull this version before they are
                # healthy.
                self._tell_engines(f"weight sync of version {version}", "catch_up", version)
        return problem

    def drain_hub_deaths(self) -> int:
        """Of the hub's process since the last call, that it has come back from; on rank 0."""
        return 0 if self.hub is None else self.hub.drain_restored()

    def strangers(self) -> int:
        """Connections without the keys that were refused at this rank's end of the direct way, so far."""
        return self.courier.strangers() if self.courier is not None else 0

    def close(self) -> None:
        self._wait_until_published()
        self.copier.shutdown()
        if self.hub is not None:
            self.hub.close()
        if self.courier is not None:
            self.courier.close()

    def _announce(self, version: int) -> int:
        if self.hub is None:
            return 0
        self._wait_until_published()
        return self.hub.announce(version)

    def _copy(self, group: Group, slices: list[TensorSlice], flat: Tensor | None) -> Future[Bucket]:
        """The bucket on its way to the object store, beside what else goes on; only a few are kept for it."""
        if flat is None:
            flat = flatten(group, slices)
        self.under_way = [copy for copy in self.under_way if not copy.done()]
        if len(self.under_way) == COPIES_UNDER_WAY:
            self.under_way[0].result()
        copy: Future[Bucket] = self.copier.submit(lambda: (slices, ray.put(flat.cpu().numpy())))
        self.under_way.append(copy)
        return copy

    def _publish(self, number: int, version: int, copies: Sequence[Future[Bucket]]) -> None:
        publication = Publication(number, version, [copy.result() for copy in copies])
        assert self.hub is not None
        self.hub.publish(publication)

    def _wait_until_published(self) -> None:
        if self.publishing is not None:
            self.publishing.result(self.timeout_seconds)
            self.publishing = None

    def engines_sleep(self) -> int:
        """The trainers' turn: every running engine gives its memory up; returns the bytes, on rank 0.

        Engines that start meanwhile wait for their turn. Raises `TimeoutError` like `push`.
        """
        if self.hub is None:
            return 0
        self.hub.set_turn(False)
        answers = self._tell_engines("putting the engines to sleep", "sleep")
        return sum(answer["freed_bytes"] for answer in answers)

    def engines_wake(self, part: Part) -> None:
        """The engines' turn, in two stages: `weights`, which are then to be pushed, and `kv_cache`."""
        if self.hub is None:
            return
        if part == "weights":
            self.hub.set_turn(True)
        self._tell_engines(f"waking the engines' {part}", "wake", part)

    def record(self, what: str) -> None:
        """In the hub's trace, for rank 0."""
        if self.hub is not None:
            self.hub.call("record", "trainers", what)

    def _tell_engines(self, what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
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
