"""Rollout deployment: Serve replicas, each a CPU-only proxy of a vLLM engine in a child actor on a slot.

A replica generates only with the latest published weights: it pulls them before it becomes healthy, on
`catch_up`, and when a request needs a newer version than it holds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, ObjectLostError
from ray.serve.config import RequestRouterConfig

from rayrlhf.placement.memory_turns import Stage, lease_of
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.replica import SlotChild
from rayrlhf.placement.serve_status import failed_starts, health_check_period
from rayrlhf.placement.slots import Slots
from rayrlhf.rollout.failures import EngineDied
from rayrlhf.samples import EncodedImage
from rayrlhf.weights.store import Bucket, Part, Publication, StoreNotRestored, TensorSlice

if TYPE_CHECKING:
    from rayrlhf.weights.transfer_group import DirectPush, TransferGroup

EXIT_SECONDS = 0.2
RETRY_SECONDS = 0.2
Fetched = Sequence[tuple[Sequence[TensorSlice], Any]]  # buckets with their bytes, or None for those of a link
STICKY_ROUTER: Any = "rayrlhf.rollout.sticky_router.StickyRouter"
WEIGHTS_INVALID = -1  # load was interrupted or memory released: reload whatever is latest


@dataclass(frozen=True)
class Generation:
    """The engine's output for one request."""

    token_ids: list[int]
    text: str  # without special tokens
    logprobs: list[float]  # one per token
    truncated: bool
    policy_versions: list[int]  # one per token: weights may be updated during generation
    # [tokens of prompt and response, L, K] int16, with router replay: the experts of each token; -1: unknown
    routed_experts: np.ndarray | None = None


@dataclass(frozen=True)
class EngineSettings:
    engine_args: dict[str, Any]  # of vLLM's EngineArgs
    env_vars: dict[str, str]
    weight_store: str | None  # name of the actor with the published weights; None: weights never change
    rpc_timeout_seconds: float
    start_timeout_seconds: float
    router_replay: bool = False  # generations have `routed_experts`
    keeps_cache: bool = False  # of running requests, over pushes


class EngineActor:
    """Actor with a vLLM engine; keeps track of its weight version."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.stepper: Any = None
        self.version = 0
        self.publication = 0  # number of the publication that is loaded
        self.base = 0  # number of the publication of the weights under its adapter; 0: the checkpoint
        name = settings.weight_store
        self.weight_store: Any = None if name is None else ray.get_actor(name, namespace=NAMESPACE)
        self.transfer_group: TransferGroup | None = None  # the last one joined
        self.updating = asyncio.Lock()
        self.released: set[str] = set()  # parts of the memory (`Part`) that the sleeping engine has released
        self.lease: str | None = None  # name of its lease; None: no engine of the run ever sleeps

    async def owns_memory(self) -> bool:
        """False while colocated trainers own the GPU memory."""
        return self.weight_store is None or await self._call_store("engines_own_memory")

    async def _call_store(self, method: str, *arguments: Any) -> Any:
        """Call a method of the weight store; waits while it restarts after the death of its process."""
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while True:
            try:
                return await getattr(self.weight_store, method).remote(*arguments)
            except (StoreNotRestored, ActorUnavailableError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def start(self, name: str, lease: str | None = None) -> int:
        """Build the engine, load what is published and generate once to warm it up. Afterwards it sleeps if
        it is the trainers' turn. It waits for no weights: trainers may wait for it (`engines_sleep`).

        Args:
            lease: name of its lease, in the stage "starting".

        Returns:
            The weight version it holds.
        """
        from rayrlhf.rollout.vllm_engine import (
            Stepper,  # vllm takes seconds to import: only here, where it runs
        )

        self.name, self.lease = name, lease
        self.stepper = Stepper(
            self.settings.engine_args,
            router_replay=self.settings.router_replay,
            keeps_cache=self.settings.keeps_cache,
        )
        self.devices = await self.stepper.device_keys()
        if self.weight_store is not None:
            first: Publication = await self._call_store("latest")
            self.version = min(0, first.version) if first.number == 0 else 0  # of the checkpoint
        with suppress(ObjectLostError):  # of a trainer that died: the first request waits for its successor
            async with self.updating:
                await self._load_newer(0, in_time=False)
        params = {"max_tokens": 2, "temperature": 1.0, "logprobs": 0}
        async for _ in self.stepper.stream([1, 2, 3], [params]):
            pass
        if await self.owns_memory():
            await self._move_to("awake")
        else:
            await self.sleep()
        return self.version

    async def _move_to(self, stage: Stage, what: str | None = None) -> None:
        """Move the lease to a stage and record what has happened, in one call."""
        if self.lease is not None:
            event = None if what is None else (self.name, what)
            await self._call_store("move_turn_to", self.lease, stage, event)
        elif what is not None:
            await self._record(what)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: list[dict[str, Any]],
        min_version: int,
        images: Sequence[EncodedImage] = (),
    ) -> AsyncIterator[tuple[int, Generation]]:
        if self.released:
            await self._wake_after_start()
        if self.version < min_version:
            await self.catch_up(min_version)
        async for index, output in self.stepper.stream(prompt_ids, sampling, images):
            yield index, _generation(output)

    async def catch_up(self, at_least: int) -> int:
        """Load the latest published weights unless they are already loaded. Waits for a version that has been
        announced: until it is published, or arrives directly.

        Returns:
            The version the engine then holds.

        Raises:
            RuntimeError: if no version >= `at_least` is published in time, or if the engine sleeps.
        """
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while True:
            async with self.updating:
                self._require_weights_memory()
                waits = await self._load_newer(at_least, in_time=time.monotonic() < deadline)
                if not waits:
                    break
            await asyncio.sleep(RETRY_SECONDS)
        if self.version < at_least:
            raise RuntimeError(
                f"version {at_least} was requested, but the latest published version is {self.version}"
            )
        return self.version

    async def _load_newer(self, at_least: int, *, in_time: bool) -> bool:
        """Load what is published and newer; returns whether to wait for `at_least` to be published.

        Buckets are lost when their trainer dies; it publishes the version it resumes from after its restart.
        """
        if self.weight_store is None:
            return False
        publication: Publication = await self._call_store("latest")
        held = WEIGHTS_INVALID if self.publication == WEIGHTS_INVALID else self.version
        if held < at_least and publication.version < at_least:
            if await self._call_store("is_coming", at_least):
                return in_time
            # It may have been published between the two calls: then it is loaded at the next try.
            return (await self._call_store("latest")).version >= at_least
        if publication.number <= self.publication:
            return False
        base = publication.base
        missing = [] if base is None or base.number == self.base else base.buckets
        try:
            base_buckets, buckets = await _fetch(missing), await _fetch(publication.buckets)
        except ObjectLostError:
            if not in_time:
                raise
            return True
        if buckets:
            await self.stepper.pause()
            if base_buckets:
                assert base is not None
                await self._load_weights(base_buckets, publication.version)
                self.base = base.number
            await self._load(publication, buckets)
        return False

    async def receive(self, push: DirectPush, replica: int) -> None:
        """Load weights that the trainers push directly.

        Raises:
            TransferFailed: this version can then only be loaded by `catch_up`.
        """
        transfer_group = push.transfer_group
        if replica not in transfer_group.receivers:
            return
        async with self.updating:
            try:
                self._require_weights_memory()
                if self.transfer_group != transfer_group:
                    await self.stepper.join(transfer_group, transfer_group.first_rank(replica))
                    self.transfer_group = transfer_group
                await self.stepper.pause()
                self.publication = WEIGHTS_INVALID
                buckets = [(slices, None) for slices in push.buckets]
                await self._load(push, buckets)
            except Exception as error:
                from rayrlhf.weights.transfer_group import abort_transfer  # imports torch

                self.transfer_group = None
                await asyncio.to_thread(abort_transfer, transfer_group, f"{self.name}: {error}", replica)
                await self.stepper.leave()
                raise

    def _require_weights_memory(self) -> None:
        if "weights" in self.released:
            raise RuntimeError("cannot load weights while the engine sleeps: the trainers own its memory")

    async def verify(self, version: int, checksums: dict[str, int]) -> dict[str, str]:
        """What is wrong with the tensors of this version, by name; empty if nothing is."""
        async with self.updating:
            if self.version != version:
                raise RuntimeError(
                    f"the engine holds version {self.version}, not {version}: it cannot be verified"
                )
            return await self.stepper.differences(checksums)

    async def _load(self, push: Publication | DirectPush, buckets: Fetched) -> None:
        """Load all weights, or an adapter alone, into the paused engine, then resume it."""
        number, version, adapter = push.number, push.version, push.adapter
        if adapter is None:
            await self._load_weights(buckets, version, verify=push.verify)
        else:
            await self.stepper.start_adapter_update()
            for slices, flat in buckets:
                await self.stepper.load_adapter_bucket(slices, flat)
            await self.stepper.finish_adapter_update(version, adapter)
        self.publication, self.version = number, version
        await self._record(f"loaded version {version}")
        if not self.released:
            await self.stepper.resume()

    async def _load_weights(self, buckets: Fetched, version: int, *, verify: bool = False) -> None:
        await self.stepper.start_weight_update(verify=verify)
        for slices, flat in buckets:
            await self.stepper.load_bucket(slices, flat)
        await self.stepper.finish_weight_update(version)

    async def sleep(self) -> int:
        """Release weights and cache; returns the freed bytes. Requests that still run fail: nobody waits for
        them (those of a trainer that died, or that are past their deadline).
        """
        async with self.updating:
            if self.released:
                await self._move_to("asleep")  # a store that was restarted took it for awake
                return 0
            freed = await self.stepper.release_memory()
            self.released = {"weights", "kv_cache"}
            self.publication = WEIGHTS_INVALID
            await self._move_to("asleep", f"asleep, {freed} bytes freed")
            return freed

    async def wake(self, part: Part) -> None:
        """Reacquire a part of the memory. The cache requires that the weights have been loaded."""
        async with self.updating:
            if part not in self.released:
                return
            if part == "kv_cache" and self.publication == WEIGHTS_INVALID:
                raise RuntimeError(
                    "cannot wake the cache before weights are pushed: a sleeping engine keeps none"
                )
            if "weights" in self.released:
                await self._move_to("awake")
            await self.stepper.reacquire_memory(part)
            self.released.remove(part)
            await self._record(f"awake: {part}")
            if not self.released:
                await self.stepper.resume()

    async def _wake_after_start(self) -> None:
        """Wake an engine that started while the trainers owned the memory, and so missed `wake`."""
        if not await self.owns_memory():
            raise RuntimeError("cannot generate while the engine sleeps: the trainers own its memory")
        await self.wake("weights")
        await self.catch_up(await self._call_store("newest_version"))
        await self.wake("kv_cache")

    async def _record(self, what: str) -> None:
        if self.weight_store is not None:
            await self._call_store("record", self.name, what)

    async def describe(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"engine_pid": os.getpid(), "version": self.version, "devices": self.devices, "node": node}

    async def check(self) -> int:
        self.stepper.raise_if_dead()
        return self.version


async def _fetch(buckets: Sequence[Bucket]) -> Fetched:
    return [(slices, await ref) for slices, ref in buckets]


def _generation(output: Any) -> Generation:
    completion = output.outputs[0]
    token_ids, logprobs = list(completion.token_ids), list(completion.logprobs.logprobs)
    if len(logprobs) != len(token_ids):
        raise ValueError(f"the engine returned {len(logprobs)} log-probabilities of {len(token_ids)} tokens")
    return Generation(
        token_ids=token_ids,
        text=completion.text,
        logprobs=logprobs,
        truncated=completion.finish_reason == "length",
        policy_versions=[
            _version(span.version)
            for span in completion.weight_versions or []
            for _ in range(span.start, span.end)
        ],
        routed_experts=completion.routed_experts,
    )


def _version(label: str) -> int:
    """The policy version of vLLM's label; "default" labels the weights it loaded from the checkpoint."""
    if label == "default":
        return 0
    if not label.isdecimal():
        raise ValueError(f"the engine's weights have the version {label!r}; wanted a number, or 'default'")
    return int(label)


class RolloutReplica:
    """Serve replica that proxies one engine."""

    async def __init__(self, settings: EngineSettings, slots: Slots) -> None:
        self.engine = SlotChild(
            "rollout",
            EngineActor,
            settings,
            slots=slots,
            env_vars=settings.env_vars,
            timeout_seconds=settings.rpc_timeout_seconds,
        )
        name, lease = f"engine {self.engine.rank}", lease_of(slots, "rollout", self.engine.rank)
        if lease is not None:
            await lease.claim("starting")
        await self.engine.call(
            "start", name, lease and lease.name, timeout_seconds=settings.start_timeout_seconds
        )

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: list[dict[str, Any]],
        min_version: int,
        images: Sequence[EncodedImage] = (),
    ) -> AsyncIterator[tuple[int, Generation]]:
        """Yield (index, generation) per entry of `sampling` as each finishes. Leaving the iteration early
        aborts the rest.

        Args:
            sampling: arguments of vLLM's SamplingParams.
            min_version: lowest weight version to start generation with.
            images: of the prompt, in the order of their tokens in `prompt_ids`.
        """
        try:
            async for finished in self.engine.stream("generate", prompt_ids, sampling, min_version, images):
                yield finished
        except EngineDied:
            asyncio.get_running_loop().call_later(
                EXIT_SECONDS, os._exit, 1
            )  # after the caller has received the error
            raise

    async def complete(self, prompt_ids: list[int], params: dict[str, Any], min_version: int) -> Generation:
        """One generation for one set of arguments of vLLM's SamplingParams."""
        [(_, generation)] = [item async for item in self.generate(prompt_ids, [params], min_version)]
        return generation

    async def catch_up(self, version: int) -> dict[str, int]:
        return {"replica": self.engine.rank, "version": await self.engine.call("catch_up", version)}

    async def receive(self, push: DirectPush) -> dict[str, int]:
        await self.engine.call("receive", push, self.engine.rank)
        return {"replica": self.engine.rank}

    async def verify(self, version: int, checksums: dict[str, int]) -> dict[str, Any]:
        wrong = await self.engine.call("verify", version, checksums)
        return {"replica": self.engine.rank, "wrong": wrong}

    async def sleep(self) -> dict[str, int]:
        return {"replica": self.engine.rank, "freed_bytes": await self.engine.call("sleep")}

    async def wake(self, part: Part) -> dict[str, int]:
        await self.engine.call("wake", part)
        return {"replica": self.engine.rank}

    async def describe(self) -> dict[str, Any]:
        engine = await self.engine.call("describe")
        return {"replica": self.engine.rank, "pid": os.getpid(), **engine}

    async def check_health(self) -> None:
        await self.engine.call("check")


def rollout_deployment(
    settings: EngineSettings, slots: Slots, *, num_engines: int, max_requests: int, sessions: bool = False
) -> Any:
    """The bound deployment for `serve.run`; the number of replicas is fixed, and each runs on the slot of its
    rank.

    Args:
        max_requests: that an engine computes at once.
        sessions: requests with a `session_id` go to the engine of the session's first (`StickyRouter`).
    """
    router = RequestRouterConfig(request_router_class=STICKY_ROUTER) if sessions else RequestRouterConfig()
    deployment = serve.deployment(RolloutReplica).options(
        name="rollout",
        num_replicas=num_engines,
        # Those of the next half wait in vLLM's queue instead of Serve's router, which looks again after up to
        # half a second.
        max_ongoing_requests=2 * max_requests,
        request_router_config=router,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=health_check_period(num_engines),
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(num_engines),
    )
    return deployment.bind(settings, slots)
