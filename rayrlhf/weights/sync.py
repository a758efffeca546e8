"""Weight sync from trainer to engines, by policy version.

The trainer flattens its parameters into buckets of raw bytes. A direct backend sends them to the engines that
run (`weights.direct`). Where there is none, or where it does not reach an engine, they are put into the
object store and published as a list under a version number; replicas pull. So a replica that was down during
a push gets the same weights, by the same code, after its restart: it asks for the version that a request
needs, and the trainers publish what they have pushed, unless they have begun to change it; then the next push
reaches the replica. With weights that are partitioned over the ranks (ZeRO-3), rank 0 alone has nothing to
publish later: every push is published.

`push` sends all weights; `push_adapter` a LoRA adapter, which engines add to the checkpoint they have loaded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from rayrlhf.models.adapters import AdapterMatrix
from rayrlhf.models.checkpoint_tensors import CheckpointTensors
from rayrlhf.placement.memory_turns import POLL_SECONDS, Stage, TurnsNotKnown
from rayrlhf.weights.buckets import GatheredTensor, Group, Sendable, flatten, lay_out, plan_buckets
from rayrlhf.weights.checksum import checksum
from rayrlhf.weights.direct import DirectSender
from rayrlhf.weights.store import AdapterSpec, Base, Bucket, Part, Publication, StoreState, TensorSlice
from rayrlhf.weights.store_client import StoreClient
from rayrlhf.weights.transfer_group import Backend

MAX_NAMED = 10  # tensors in a message
MAX_PENDING_COPIES = 2  # buckets that wait to be put into the object store
Gathered = Callable[[list[Tensor]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Pushed:
    """A push of rank 0."""

    number: int
    version: int
    plan: Sequence[tuple[Group, list[TensorSlice]]]
    adapter: AdapterSpec | None
    verify: bool


class PushDiffers(RuntimeError):
    """After a push, an engine does not hold the trainer's tensors."""


class WeightSync:
    """Trainer side. Every method is collective: all ranks gather parameters, some of them send."""

    def __init__(
        self,
        weight_store: ActorHandle,
        engines: DeploymentHandle,
        *,
        route: Backend | Literal["object_store"],
        rank: int,
        device: torch.device,
        num_engines: int,
        bucket_bytes: int,
        timeout_seconds: float,
        start_timeout_seconds: float,
        gathered: Gathered,
        gather: Callable[[list[Any]], list[Any]],
        partitioned: bool = True,
    ) -> None:
        """
        Args:
            partitioned: no rank has whole weights.
            timeout_seconds: of a call to all engines.
            start_timeout_seconds: of an engine's start, during which it cannot be put to sleep.
            gathered: context manager that all-gathers partitioned parameters (ZeRO-3).
            gather: concatenates the ranks' lists (all-gather).
        """
        self.weight_store = (
            StoreClient(weight_store, timeout_seconds, self._publish_pushed) if rank == 0 else None
        )
        self.gather = gather
        self.engines = engines
        self.rank = rank
        self.num_engines = num_engines
        self.bucket_bytes = bucket_bytes
        self.timeout_seconds = timeout_seconds
        self.start_timeout_seconds = start_timeout_seconds
        self.gathered = gathered
        self.direct: DirectSender | None = None
        if route != "object_store":
            self.direct = DirectSender(
                route,
                self._call_engines,
                rank=rank,
                device=device,
                gather=gather,
                timeout_seconds=timeout_seconds,
            )
        self.copier = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self.publishing: Future[None] | None = None
        self.base: Base | None = None  # of the adapters, once it has been sent
        self.pending_copies: list[Future[Bucket]] = []
        self.partitioned = partitioned
        self.pushed: Pushed | None = None  # by rank 0, not published, and unchanged since
        self.pushed_lock = threading.Lock()

    def needs_push(self, version: int) -> bool:
        """True if engines may hold a different version, as after a restart of the trainer, or are asleep and
        hold no weights.
        """
        states: list[StoreState] = [] if self.weight_store is None else [self.weight_store.call("current")]
        latest, (number, _), awake = self.gather(states)[0]
        return version > 0 or max(number, latest.number) > 0 or latest.version < version or not awake

    def push(self, weights: Iterable[CheckpointTensors], version: int, *, verify: bool = False) -> str | None:
        """Load these weights as `version` into every running engine.

        Args:
            verify: compare what each engine then holds with checksums of the tensors.

        Returns:
            Why the direct transfer failed and the object store was used instead; None if it did not fail.

        Raises:
            TimeoutError: if an engine did not load them; names the engines that did.
            PushDiffers: if an engine holds others; names engines and tensors.
        """
        if not verify:
            return self._push(weights, version)
        weights = list(weights)
        problem = self._push(weights, version, verify=True)
        self._verify(weights, version)
        return problem

    def _verify(self, weights: Iterable[CheckpointTensors], version: int) -> None:
        """Compare every engine's tensors with these, not with the buckets made of them. Collective."""
        checksums: dict[str, int] = {}
        for tensors in weights:
            with self.gathered(tensors.parts):
                if self.rank == 0:
                    made = zip(tensors.specs, tensors.tensors(), strict=True)
                    checksums |= {spec.name: checksum(tensor) for spec, tensor in made}
        found: list[str] = []
        if self.rank == 0:
            what = f"verification of version {version}"
            answers = self._call_engines(what, "verify", version, checksums)
            answers.sort(key=lambda answer: answer["replica"])
            found = [difference_text(each["replica"], each["wrong"]) for each in answers if each["wrong"]]
        if found := self.gather(found):
            raise PushDiffers(f"push of version {version}: {'; '.join(found)}")

    def push_adapter(
        self,
        matrices: Iterable[AdapterMatrix],
        version: int,
        *,
        rank: int,
        dtype: torch.dtype,
        base: Iterable[CheckpointTensors] | None = None,
    ) -> str | None:
        """Like `push`, of a LoRA adapter alone: the engines hold its base.

        Args:
            rank: of the adapter.
            dtype: of the engines' adapters, to which the matrices are rounded here; their checksums are of
                the rounded ones.
            base: the adapter's base if it is not the engines' checkpoint. The first push sends it through the
                object store, which keeps it for engines that start later.

        Raises:
            TimeoutError: also if an engine's adapter differs; names tensors.
        """
        matrices = list(matrices)
        with self.gathered([matrix.parameter for matrix in matrices]):
            tensors = [GatheredTensor(matrix.name, matrix.scaled(dtype)) for matrix in matrices]
        spec = AdapterSpec(rank, {name: checksum(tensor) for name, tensor, _ in tensors})
        return self._push(tensors, version, spec, base)

    def _push(
        self,
        tensors: Iterable[Sendable],
        version: int,
        adapter: AdapterSpec | None = None,
        base: Iterable[CheckpointTensors] | None = None,
        *,
        verify: bool = False,
    ) -> str | None:
        plan = [(group, lay_out(group)) for group in plan_buckets(tensors, self.bucket_bytes)]
        self.weights_change()
        number = self._announce(version)
        direct = self.direct
        if base is not None and self.base is None:
            self.base = Base(number, self._put(base))
            direct = None
        reached_all = direct is not None and direct.start(
            number, version, [slices for _, slices in plan], adapter, verify=verify
        )
        # An adapter is small, and its matrices are scaled copies.
        at_once = not reached_all or self.partitioned or adapter is not None
        copies: list[Future[Bucket]] = []
        for group, slices in plan:
            with self.gathered([part for tensors in group for part in tensors.parts]):
                flat = direct.send(group, slices) if direct is not None else None
                if self.rank == 0 and at_once:
                    copies.append(self._copy(group, slices, flat))
        problem = direct.finish() if direct is not None else None
        if self.rank != 0:
            return problem
        pushed = Pushed(number, version, plan, adapter, verify)
        if not at_once and problem is None:
            self.pushed = pushed
            return None
        if not at_once:
            copies = [self._copy(group, slices, None) for group, slices in plan]
        self.publishing = self.copier.submit(self._publish, pushed, copies)
        self.pending_copies = []
        if not reached_all or problem is not None:
            self._wait_until_published()
            # Engines that are starting or dead now pull this version before they become healthy.
            self._call_engines(f"weight sync of version {version}", "catch_up", version)
        return problem

    def weights_change(self) -> None:
        """To be called before the weights change: what was pushed cannot be published after that. Waits for
        a publication that has begun.
        """
        with self.pushed_lock:
            self.pushed = None

    @contextmanager
    def unread(self) -> Iterator[None]:
        """In this context no thread reads the weights, so that they can move between device and host."""
        with self.pushed_lock:
            yield

    def _publish_pushed(self) -> None:
        """Publish what was pushed, for an engine that it has not reached; in the store client's thread."""
        with self.pushed_lock:
            pushed, self.pushed = self.pushed, None
            if pushed is None:
                return
            buckets = [
                (slices, ray.put(flatten(group, slices).cpu().numpy())) for group, slices in pushed.plan
            ]
            self._publish(pushed, buckets)

    def drain_store_restarts(self) -> int:
        """Number of times the weight store was restored since the last call; 0 on ranks other than 0."""
        return 0 if self.weight_store is None else self.weight_store.drain_restored()

    def num_refused_connections(self) -> int:
        """Unauthorised connections refused by all ranks' transfer stores, over the run."""
        return self.direct.num_refused_connections if self.direct is not None else 0

    def close(self) -> None:
        self._wait_until_published()
        self.copier.shutdown()
        if self.weight_store is not None:
            self.weight_store.close()
        if self.direct is not None:
            self.direct.close()

    def _announce(self, version: int) -> int:
        if self.weight_store is None:
            return 0
        self._wait_until_published()
        return self.weight_store.announce(version)

    def _copy(self, group: Group, slices: list[TensorSlice], flat: Tensor | None) -> Future[Bucket]:
        """Put the bucket into the object store in the background; blocks if too many copies are pending."""
        if flat is None:
            flat = flatten(group, slices)
        self.pending_copies = [copy for copy in self.pending_copies if not copy.done()]
        if len(self.pending_copies) == MAX_PENDING_COPIES:
            self.pending_copies[0].result()
        copy: Future[Bucket] = self.copier.submit(lambda: (slices, ray.put(flat.cpu().numpy())))
        self.pending_copies.append(copy)
        return copy

    def _put(self, weights: Iterable[CheckpointTensors]) -> list[Bucket]:
        """The weights in the object store; empty on ranks other than 0."""
        copies: list[Future[Bucket]] = []
        for group in plan_buckets(weights, self.bucket_bytes):
            with self.gathered([part for tensors in group for part in tensors.parts]):
                if self.rank == 0:
                    copies.append(self._copy(group, lay_out(group), None))
        return [copy.result() for copy in copies]

    def _publish(self, pushed: Pushed, copies: Sequence[Future[Bucket] | Bucket]) -> None:
        buckets = [copy.result() if isinstance(copy, Future) else copy for copy in copies]
        publication = Publication(
            pushed.number, pushed.version, buckets, pushed.adapter, self.base, pushed.verify
        )
        assert self.weight_store is not None
        self.weight_store.publish(publication)

    def _wait_until_published(self) -> None:
        if self.publishing is not None:
            self.publishing.result(self.timeout_seconds)
            self.publishing = None

    def engines_sleep(self) -> int:
        """Give the memory to the trainers: every engine frees its weights and cache.

        Engines that have not begun to start wait until `engines_wake`; those that are starting measure the
        free memory and cannot be interrupted, so they are waited for.

        Returns:
            Freed bytes on rank 0; 0 on other ranks.

        Raises:
            TimeoutError: like `push`, and if an engine still holds memory after `start_timeout_seconds`.
        """
        if self.weight_store is None:
            return 0
        self.weight_store.set_engines_own_memory(False)
        deadline = time.monotonic() + self.start_timeout_seconds
        freed = 0
        while True:
            answers = self._call_engines("putting the engines to sleep", "sleep")
            freed += sum(answer["freed_bytes"] for answer in answers)
            up = self._engines_up()
            if up is not None and not up:
                return freed
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"GPU memory is not free: after rollout.start_timeout_seconds="
                    f"{self.start_timeout_seconds:g} these engines still hold theirs: {up}"
                )
            time.sleep(POLL_SECONDS)

    def _engines_up(self) -> dict[str, Stage] | None:
        """Engines that hold memory; None while that is not known."""
        assert self.weight_store is not None
        try:
            return self.weight_store.call("engines_up")
        except TurnsNotKnown:
            return None

    def engines_wake(self, part: Part) -> None:
        """Give the memory to the engines, in two stages: `weights`, to be pushed then, and `kv_cache`."""
        if self.weight_store is None:
            return
        if part == "weights":
            self.weight_store.set_engines_own_memory(True)
        self._call_engines(f"waking the engines' {part}", "wake", part)

    def record(self, what: str) -> None:
        """Add an event to the weight store's trace, on rank 0."""
        if self.weight_store is not None:
            self.weight_store.call("record", "trainers", what)

    def _call_engines(self, what: str, method: str, *arguments: Any) -> list[dict[str, Any]]:
        """Call a method on all running engines; returns their answers.

        Raises:
            TimeoutError: if it failed on one of them; names the engines on which it succeeded.
        """
        # Serve serialises arguments again for every engine: those of a push take 2 ms.
        shared = [a if isinstance(a, int | str) else ray.put(a) for a in arguments]
        try:
            answers: list[Any] = self.engines.broadcast(method, *shared).results(
                timeout_s=self.timeout_seconds, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        failed = [a for a in answers if isinstance(a, BaseException) and not isinstance(a, RayActorError)]
        done = [a for a in answers if isinstance(a, dict)]
        if failed:
            raise TimeoutError(
                f"{what}: of {self.num_engines} engines only {sorted(a['replica'] for a in done)} finished "
                f"within {self.timeout_seconds:g} s; first failure: {failed[0]!r}"
            ) from failed[0]
        return done


def difference_text(replica: int, wrong: dict[str, str]) -> str:
    """E.g. "engine 1 differs in 2 tensors: lm_head.weight (not received), …"."""
    named = [f"{name} ({why})" for name, why in sorted(wrong.items())]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    count = f"{len(named)} tensor{'s' * (len(named) > 1)}"
    return f"engine {replica} differs in {count}: {', '.join(named[:MAX_NAMED])}{more}"
