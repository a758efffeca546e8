"""The frozen reference policy: a copy in the worker, replicas behind Serve, or the actor without adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from ray import serve
from torch import Tensor

from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import ModelConfig, TrainedModelConfig
from rayrlhf.config.train import OptimizerConfig
from rayrlhf.models.adapters import adapters_off
from rayrlhf.models.load import load_policy, resolve_dtype
from rayrlhf.placement.apply import Slots
from rayrlhf.placement.child import SlotChild
from rayrlhf.train import collectives
from rayrlhf.train.engine import loading, make_engine
from rayrlhf.train.learner import Learner
from rayrlhf.train.sequences import share_sequences, together


class Reference(Protocol):
    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Per-token log-probabilities [T] of each micro-batch."""
        ...


class LocalReference:
    """A frozen copy beside the actor; partitioned over the ranks when the actor is (ZeRO-3)."""

    def __init__(self, model: TrainedModelConfig, path: str, train: OptimizerConfig) -> None:
        device = collectives.device()
        dtype = resolve_dtype(model.dtype, device)
        with loading(train, dtype):
            policy = load_policy(model, path, device=device, chunk_tokens=train.logprob_chunk_tokens).eval()
        policy.requires_grad_(False)
        share_sequences(policy, model, train)
        self.module = policy
        if train.zero_stage == 3:
            self.policy: Any = make_engine(policy, train, lr=None, dtype=dtype)
        else:
            self.policy = policy.to(device)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        told: list[Tensor] = []
        for batch, is_own in together(self.module, batches):
            logprobs = _logprobs(self.policy, batch, temperature)
            told += [logprobs] if is_own else []
        return told


class AdaptersOff:
    """A learner without the adapters that it trains: the model that it was at its start, held only once."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        with adapters_off(self.learner.module):
            return self.learner.infer(batches, lambda policy, batch: _logprobs(policy, batch, temperature))


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
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = (
            load_policy(model, path, device=self.device, chunk_tokens=chunk_tokens).eval().to(self.device)
        )

    def ready(self) -> bool:
        return True

    @torch.inference_mode()
    def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        return _logprobs(self.policy, batch.to(self.device), temperature).cpu()


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


def _logprobs(policy: Any, batch: PackedBatch, temperature: float) -> Tensor:
    return policy(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, temperature
    ).logprobs
