"""The frozen reference policy behind Ray Serve: who asks it, and replicas, each with an actor on its slot."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from ray import serve
from torch import Tensor

from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import ModelConfig
from rayrlhf.placement.apply import Slots
from rayrlhf.placement.child import SlotChild


class ServedReference:
    """Asks the reference deployment, all micro-batches at once."""

    def __init__(self, handle: Any, *, timeout_seconds: float) -> None:
        self.handle = handle
        self.timeout_seconds = timeout_seconds

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        return asyncio.run(self._all(batches, temperature))

    async def _all(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        answers = asyncio.gather(*(self._one(batch, temperature) for batch in batches))
        return list(await asyncio.wait_for(answers, self.timeout_seconds))

    async def _one(self, batch: PackedBatch, temperature: float) -> Tensor:
        cpu = batch.to("cpu")
        asked = PackedBatch(cpu.input_ids, cpu.position_ids, cpu.cu_seqlens, cpu.loss_mask)
        return (await self.handle.logprobs.remote(asked, temperature)).to(batch.input_ids.device)


class ReferenceActor:
    def __init__(self, model: ModelConfig, path: str, chunk_tokens: int) -> None:
        from rayrlhf.models.load import load_policy  # and transformers: not in the replica

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy = load_policy(model, path, device=self.device, chunk_tokens=chunk_tokens)
        self.policy = policy.eval().to(self.device)

    def ready(self) -> bool:
        return True

    @torch.inference_mode()
    def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        from rayrlhf.train.reference import logprobs_of

        return logprobs_of(self.policy, batch.to(self.device), temperature).cpu()


class ReferenceReplica:
    """The Serve replica in front of one reference model."""

    async def __init__(self, model: ModelConfig, path: str, chunk_tokens: int, slots: Slots) -> None:
        self.reference = SlotChild(
            "ref", ReferenceActor, model, path, chunk_tokens, slots=slots, env_vars={}, timeout_seconds=600
        )
        await self.reference.call("ready", timeout_seconds=600)

    async def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        return await self.reference.call("logprobs", batch, temperature)

    async def check_health(self) -> None:
        await self.reference.call("ready")


def reference_deployment(
    model: ModelConfig, path: str, *, chunk_tokens: int, num_replicas: int, slots: Slots
) -> Any:
    deployment = serve.deployment(ReferenceReplica).options(
        name="ref",
        num_replicas=num_replicas,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0},
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(model, path, chunk_tokens, slots)
