"""The teacher of distillation: a frozen copy in the worker, or replicas behind Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from ray import serve

from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.supervised import KdRunConfig
from rayrlhf.models.distill import Teacher as TeacherAnswer
from rayrlhf.models.load import load_teacher
from rayrlhf.placement.apply import Slots
from rayrlhf.placement.child import SlotChild


class Teacher(Protocol):
    def answers(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        """What it would have said in the place of each learnt token of each micro-batch."""
        ...


class LocalTeacher:
    """A whole copy in every worker, ZeRO or not: its output projection is needed while the student learns."""

    def __init__(self, config: KdRunConfig, device: torch.device) -> None:
        self.model = load_teacher(
            config.model, config.teacher.path, device=device, chunk_tokens=config.train.logprob_chunk_tokens
        ).to(device)

    def answers(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        return [self.model(b.input_ids, b.position_ids, b.cu_seqlens, b.loss_mask) for b in batches]


class ServedTeacher:
    """Asks the deployment for its `top_k` tokens, all micro-batches at once."""

    def __init__(self, handle: Any, *, top_k: int, timeout_seconds: float) -> None:
        self.handle = handle
        self.top_k = top_k
        self.timeout_seconds = timeout_seconds

    def answers(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        return asyncio.run(self._all(batches))

    async def _all(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        answers = asyncio.gather(*(self._one(batch) for batch in batches))
        return list(await asyncio.wait_for(answers, self.timeout_seconds))

    async def _one(self, batch: PackedBatch) -> TeacherAnswer:
        cpu = batch.to("cpu")
        asked = PackedBatch(cpu.input_ids, cpu.position_ids, cpu.cu_seqlens, cpu.loss_mask)
        answer = await self.handle.top_k.remote(asked, self.top_k)
        return type(answer)(*(tensor.to(batch.input_ids.device) for tensor in answer))


class TeacherActor:
    def __init__(self, model: ModelConfig, path: str, chunk_tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_teacher(model, path, device=self.device, chunk_tokens=chunk_tokens).to(self.device)

    def ready(self) -> bool:
        return True

    @torch.inference_mode()
    def top_k(self, batch: PackedBatch, k: int) -> TeacherAnswer:
        b = batch.to(self.device)
        answer = self.model.top_k(b.input_ids, b.position_ids, b.cu_seqlens, b.loss_mask, k)
        return type(answer)(*(tensor.cpu() for tensor in answer))


class TeacherReplica:
    """The Serve replica in front of one teacher."""

    async def __init__(self, model: ModelConfig, path: str, chunk_tokens: int, slots: Slots) -> None:
        self.teacher = SlotChild(
            "teacher", TeacherActor, model, path, chunk_tokens, slots=slots, env_vars={}, timeout_seconds=600
        )
        await self.teacher.call("ready", timeout_seconds=600)

    async def top_k(self, batch: PackedBatch, k: int) -> TeacherAnswer:
        return await self.teacher.call("top_k", batch, k)

    async def check_health(self) -> None:
        await self.teacher.call("ready")


def teacher_deployment(config: KdRunConfig, slots: Slots) -> Any:
    deployment = serve.deployment(TeacherReplica).options(
        name="teacher",
        num_replicas=config.teacher.num_replicas,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0},
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(config.model, config.teacher.path, config.train.logprob_chunk_tokens, slots)
