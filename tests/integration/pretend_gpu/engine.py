"""In the place of rayrlhf.rollout.vllm_engine: an engine without a model, with vLLM's turns of memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from rayrlhf.rollout.failures import EngineAsleep
from tests.integration.pretend_gpu import (
    CAPACITY,
    ENGINE_CACHE,
    ENGINE_CONTEXT,
    ENGINE_SHARE,
    ENGINE_WEIGHTS,
    settings,
)
from tests.integration.pretend_gpu.install import give, ledger, take, this_gpu

ENGINE = "engine"
SIZES = {"weights": ENGINE_WEIGHTS, "kv_cache": ENGINE_CACHE}


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


class Stepper:
    """The methods of the real one that a run of all weights calls."""

    def __init__(
        self, engine_args: dict[str, Any], *, router_replay: bool = False, keeps_cache: bool = False
    ) -> None:
        wanted = int(CAPACITY * ENGINE_SHARE)
        with ledger().measured(this_gpu(), ENGINE, wanted=wanted):
            take(ENGINE, "context", ENGINE_CONTEXT)
            take(ENGINE, "weights", ENGINE_WEIGHTS)
            time.sleep(settings().start_seconds)
        take(ENGINE, "kv_cache", ENGINE_CACHE)
        self.running: set[asyncio.Future[None]] = set()
        self.version = "default"
        self.link: Any = None

    async def stream(
        self, prompt_ids: list[int], sampling: list[dict[str, Any]], images: Sequence[Any] = ()
    ) -> AsyncIterator[tuple[int, Any]]:
        loop = asyncio.get_running_loop()
        for index, params in enumerate(sampling):
            done = loop.create_future()
            self.running.add(done)
            if not settings().endless.exists():
                loop.call_later(settings().request_seconds, _finish, done)
            try:
                await done
            finally:
                self.running.discard(done)
            count = params["max_tokens"]
            yield (
                index,
                SimpleNamespace(
                    outputs=[
                        SimpleNamespace(
                            token_ids=[7 + index] * count,
                            logprobs=SimpleNamespace(logprobs=[-5.0] * count),
                            text="a" * (index + 1),
                            finish_reason="length",
                            weight_versions=[SimpleNamespace(version=self.version, start=0, end=count)],
                            routed_experts=None,
                        )
                    ]
                ),
            )

    async def release_memory(self) -> int:
        if self.running:
            ledger().note(this_gpu(), ENGINE, "fails requests")
        for request in self.running:
            request.set_exception(EngineAsleep("asleep"))
        return sum(give(ENGINE, what) for what in ("kv_cache", "weights"))

    async def reacquire_memory(self, part: str) -> None:
        take(ENGINE, part, SIZES[part])

    async def pause(self) -> None:
        pass

    async def resume(self) -> None:
        pass

    async def device_keys(self) -> list[str]:
        import torch

        from rayrlhf.weights.shared_memory import device_key

        return [device_key(torch.device("cpu"))]

    async def join(self, transfer_group: Any, first_rank: int) -> None:
        import torch

        from rayrlhf.weights.transfer_group import join

        [key] = await self.device_keys()
        self.link = await asyncio.to_thread(
            join, transfer_group, rank=first_rank, device=torch.device("cpu"), key=key
        )

    async def leave(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.end("left")

    async def start_weight_update(self, *, verify: bool = False) -> None:
        pass

    async def load_bucket(self, slices: Sequence[Any], bucket: Any = None) -> None:
        if bucket is None:
            from rayrlhf.weights.buckets import size_of

            await asyncio.to_thread(self.link.receive, size_of(slices))
            await asyncio.to_thread(self.link.release)

    async def finish_weight_update(self, version: int) -> None:
        self.version = str(version)

    def raise_if_dead(self) -> None:
        pass
