"""The rollout deployment: Serve replicas, each a CPU-only front with its vLLM engine as a child actor on a
slot.

A replica answers only with the newest published weights: it pulls them before it becomes healthy, when told
to catch up, and when a request asks for a newer version than it holds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, ObjectLostError

from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.replica import SlotChild
from rayrlhf.placement.slots import Slots
from rayrlhf.rollout.failures import EngineDied
from rayrlhf.weights.store import HubIsBlank, Part, Publication, TensorSlice

if TYPE_CHECKING:
    from rayrlhf.weights.transfer_group import Delivery, Meeting

EXIT_SECONDS = 0.2
RETRY_SECONDS = 0.2
TURN_SECONDS = 0.5
NOTHING_WHOLE = -1  # in place of a publication's number: whichever is the newest, it is news


@dataclass(frozen=True)
class Generation:
    """What the engine produced for one request."""

    token_ids: list[int]
    text: str  # without special tokens
    logprobs: list[float]  # one per token
    truncated: bool
    policy_versions: list[int]  # one per token: new weights may arrive while it runs


@dataclass(frozen=True)
class EngineSettings:
    engine_args: dict[str, Any]  # vLLM's EngineArgs
    env_vars: dict[str, str]
    weight_hub: str | None  # name of the actor that holds the newest weights; None: they never change
    rpc_timeout_seconds: float
    start_timeout_seconds: float


class EngineActor:
    """A vLLM engine and the version of the weights that it holds."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.stepper: Any = None
        self.version = 0
        self.publication = 0  # which of the hub's these weights came with
        hub = settings.weight_hub
        self.hub: Any = None if hub is None else ray.get_actor(hub, namespace=NAMESPACE)
        self.meeting: Meeting | None = None  # the last one that we joined
        self.updating = asyncio.Lock()
        self.missing: set[str] = set()  # parts of its memory that a sleeping engine does not have

    async def is_our_turn(self) -> bool:
        """Not while trainers use the memory that this engine would take."""
        return self.hub is None or await self._ask_hub("is_engines_turn")

    async def _ask_hub(self, method: str, *arguments: Any) -> Any:
        """The hub's answer. While it comes back from the death of its process, wait for that."""
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while True:
            try:
                return await getattr(self.hub, method).remote(*arguments)
            except (HubIsBlank, ActorUnavailableError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def start(self, name: str) -> int:
        """Build, pull the newest weights and generate once, so that the first real request meets a warm
        engine.
        """
        from rayrlhf.rollout.vllm_engine import (
            Stepper,  # vllm takes seconds to import: only here, where it runs
        )

        self.name = name
        self.stepper = Stepper(self.settings.engine_args)
        self.devices = await self.stepper.device_keys()
        if self.hub is not None:
            self.version = min(0, (await self._ask_hub("newest")).version)
        await self.catch_up(0)
        params = {"max_tokens": 2, "temperature": 1.0, "logprobs": 0}
        async for _ in self.stepper.stream([1, 2, 3], [params]):
            pass
        if not await self.is_our_turn():
            await self.sleep()
        return self.version

    async def generate(
        self, prompt_ids: list[int], sampling: list[dict[str, Any]], min_version: int
    ) -> AsyncIterator[tuple[int, Generation]]:
        if self.missing:
            await self._wake_by_itself()
        if self.version < min_version:
            await self.catch_up(min_version)
        async for index, output in self.stepper.stream(prompt_ids, sampling):
            yield index, _generation(output)

    async def catch_up(self, at_least: int) -> int:
        """Load the newest published weights, if we do not hold them. Returns the version held then."""
        async with self.updating:
            self._refuse_asleep()
            publication, buckets = await self._fetch_newer(at_least)
            if buckets:
                await self.stepper.pause()
                await self._load(buckets, publication.number, publication.version)
        if self.version < at_least:
            raise RuntimeError(
                f"version {at_least} was asked for, the newest published one is {self.version}"
            )
        return self.version

    async def receive(self, delivery: Delivery, replica: int) -> None:
        """Load what the trainers send at a meeting. Raises `MeetingEnded`; then only `catch_up` helps."""
        meeting = delivery.meeting
        if replica not in meeting.guests:
            return
        async with self.updating:
            try:
                self._refuse_asleep()
                if self.meeting != meeting:
                    await self.stepper.join(meeting, meeting.first_rank(replica))
                    self.meeting = meeting
                await self.stepper.pause()
                self.publication = NOTHING_WHOLE
                buckets = [(slices, None) for slices in delivery.buckets]
                await self._load(buckets, delivery.number, delivery.version)
            except Exception as error:
                from rayrlhf.weights.transfer_group import end_meeting  # and with it torch

                self.meeting = None
                await asyncio.to_thread(end_meeting, meeting, f"{self.name}: {error}")
                await self.stepper.leave()
                raise

    def _refuse_asleep(self) -> None:
        if "weights" in self.missing:
            raise RuntimeError("asked to load weights while it sleeps: the trainers have its memory")

    async def _load(self, buckets: Sequence[tuple[Any, Any]], number: int, version: int) -> None:
        """Into a paused engine, which goes on then."""
        await self.stepper.start_weight_update()
        for slices, flat in buckets:
            await self.stepper.load_bucket(slices, flat)
        await self.stepper.finish_weight_update(version)
        self.publication, self.version = number, version
        await self._record(f"loaded version {version}")
        if not self.missing:
            await self.stepper.resume()

    async def _fetch_newer(self, at_least: int) -> tuple[Publication, list[tuple[list[TensorSlice], Any]]]:
        """A publication newer than ours with its buckets already on this node; no buckets when there is none.

        A trainer that dies takes its buckets along; restarted, it publishes the version it resumes from.
        Until then this waits, and also while the version that was asked for is being published.
        """
        if self.hub is None:
            return Publication(0, 0, []), []
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while True:
            publication: Publication = await self._ask_hub("newest")
            in_time = time.monotonic() < deadline
            if publication.version < at_least and in_time and await self._ask_hub("is_coming", at_least):
                pass
            elif publication.number <= self.publication:
                return publication, []
            else:
                try:
                    return publication, [(slices, await ref) for slices, ref in publication.buckets]
                except ObjectLostError:
                    if not in_time:
                        raise
            await asyncio.sleep(RETRY_SECONDS)

    async def sleep(self) -> int:
        """Give up weights and cache; returns the bytes. Raises `RuntimeError` while requests run."""
        async with self.updating:
            if self.missing:
                return 0
            freed = await self.stepper.give_up_memory()
            self.missing = {"weights", "kv_cache"}
            self.publication = NOTHING_WHOLE
            await self._record(f"asleep, {freed} bytes freed")
            return freed

    async def wake(self, part: Part) -> None:
        """Have that part of the memory again. The cache comes when the weights have been loaded."""
        async with self.updating:
            if part not in self.missing:
                return
            if part == "kv_cache" and self.publication == NOTHING_WHOLE:
                raise RuntimeError("asked to go on before weights were pushed: a sleeping engine keeps none")
            await self.stepper.take_memory(part)
            self.missing.remove(part)
            await self._record(f"awake: {part}")
            if not self.missing:
                await self.stepper.resume()

    async def _wake_by_itself(self) -> None:
        """It slept when it had started in the trainers' turn, and missed the call."""
        if not await self.is_our_turn():
            raise RuntimeError("asked to generate while it sleeps: the trainers have its memory")
        await self.wake("weights")
        await self.catch_up(0)
        await self.wake("kv_cache")

    async def _record(self, what: str) -> None:
        if self.hub is not None:
            await self._ask_hub("record", self.name, what)

    async def describe(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"engine_pid": os.getpid(), "version": self.version, "devices": self.devices, "node": node}

    async def check(self) -> int:
        self.stepper.raise_if_dead()
        return self.version


def _generation(output: Any) -> Generation:
    completion = output.outputs[0]
    logprobs = [
        at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return Generation(
        token_ids=list(completion.token_ids),
        text=completion.text,
        logprobs=logprobs,
        truncated=completion.finish_reason == "length",
        policy_versions=[
            _version(span.version)
            for span in completion.weight_versions or []
            for _ in range(span.start, span.end)
        ],
    )


def _version(label: str) -> int:
    """vLLM calls the weights that it loaded by itself "default": the checkpoint, version 0."""
    return int(label) if label.isdecimal() else 0


class RolloutReplica:
    """The Serve replica in front of one engine."""

    async def __init__(self, settings: EngineSettings, slots: Slots) -> None:
        self.engine = SlotChild(
            "rollout",
            EngineActor,
            settings,
            slots=slots,
            env_vars=settings.env_vars,
            timeout_seconds=settings.rpc_timeout_seconds,
        )
        # As long as the trainers' turn lasts; its own deadlines end it, or the run.
        while not await self.engine.call("is_our_turn"):
            await asyncio.sleep(TURN_SECONDS)
        name = f"engine {self.engine.rank}"
        await self.engine.call("start", name, timeout_seconds=settings.start_timeout_seconds)

    async def generate(
        self, prompt_ids: list[int], sampling: list[dict[str, Any]], min_version: int
    ) -> AsyncIterator[tuple[int, Generation]]:
        """(index, generation) per entry of `sampling` (vLLM's SamplingParams) as each finishes, begun with
        weights of at least `min_version`. Whoever stops iterating aborts the rest.
        """
        try:
            async for finished in self.engine.stream("generate", prompt_ids, sampling, min_version):
                yield finished
        except EngineDied:
            asyncio.get_running_loop().call_later(
                EXIT_SECONDS, os._exit, 1
            )  # tell the caller first, then restart
            raise

    async def complete(self, prompt_ids: list[int], params: dict[str, Any], min_version: int) -> Generation:
        """One generation for one set of vLLM's SamplingParams."""
        [(_, generation)] = [item async for item in self.generate(prompt_ids, [params], min_version)]
        return generation

    async def catch_up(self, version: int) -> dict[str, int]:
        return {"replica": self.engine.rank, "version": await self.engine.call("catch_up", version)}

    async def receive(self, delivery: Delivery) -> dict[str, int]:
        await self.engine.call("receive", delivery, self.engine.rank)
        return {"replica": self.engine.rank}

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


def rollout_deployment(settings: EngineSettings, slots: Slots, *, num_engines: int, max_requests: int) -> Any:
    """The bound deployment for `serve.run`; the number of replicas is fixed, each owns the slot of its
    rank.
    """
    deployment = serve.deployment(RolloutReplica).options(
        name="rollout",
        num_replicas=num_engines,
        max_ongoing_requests=max_requests,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(settings, slots)
