"""Serve deployments of frozen models, the reference and the teacher: their actors, and a client for them.

The Serve replicas import this module too but hold no model, so the actors do the imports that take seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayrlhf.batch import PackedBatch, tokens_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.placement.replica_front import ActorSpec, proxy_deployment
from rayrlhf.placement.slots import Slots


def ask_all(
    handle: Any, method: str, batches: Sequence[PackedBatch], *arguments: Any, timeout_seconds: float
) -> list[Any]:
    """Call `method(batch, *arguments)` on the actors behind `handle`, for all micro-batches concurrently.

    Raises:
        TimeoutError: if the answers take longer than `timeout_seconds`.
    """

    async def ask(batch: PackedBatch) -> Any:
        request = tokens_of(batch)
        return await handle.ask.remote(method, request.to("cpu"), *arguments)

    async def ask_for_all() -> list[Any]:
        return list(await asyncio.wait_for(asyncio.gather(*map(ask, batches)), timeout_seconds))

    return asyncio.run(ask_for_all())


def logprobs_of(policy: Any, batch: PackedBatch, temperature: float) -> Tensor:
    return policy(
        batch.input_ids,
        batch.position_ids,
        batch.cu_seqlens,
        batch.loss_mask,
        temperature,
        images=batch.images,
        prefixes=batch.prefixes,
    ).logprobs


class ReferenceActor:
    """Holds the initial policy."""

    def __init__(self, model: ModelConfig, path: str, chunk_tokens: int) -> None:
        from rayrlhf.models.load import load_policy

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy = load_policy(model, path, device=self.device, chunk_tokens=chunk_tokens)
        self.policy = policy.eval().to(self.device)

    def ready(self) -> bool:
        return True

    @torch.inference_mode()
    def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Per-token log-probabilities, [T] fp32, on the CPU."""
        return logprobs_of(self.policy, batch.to(self.device), temperature).cpu()


class TeacherActor:
    """Holds the teacher of knowledge distillation."""

    def __init__(self, model: ModelConfig, path: str, chunk_tokens: int) -> None:
        from rayrlhf.models.load import load_teacher

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_teacher(model, path, device=self.device, chunk_tokens=chunk_tokens).to(self.device)

    def ready(self) -> bool:
        return True

    @torch.inference_mode()
    def top_k(self, batch: PackedBatch, k: int, student_size: int) -> tuple[Tensor, Tensor]:
        """The fields of `models.distill.TeacherTopK`."""
        b = batch.to(self.device)
        ids, logprobs = self.model.top_k(
            b.input_ids, b.position_ids, b.cu_seqlens, b.loss_mask, k, student_size
        )
        return ids.cpu(), logprobs.cpu()


def reference_deployment(
    model: ModelConfig, path: str, *, chunk_tokens: int, num_replicas: int, slots: Slots
) -> Any:
    spec = ActorSpec("ref", ReferenceActor, (model, path, chunk_tokens))
    return proxy_deployment(spec, num_replicas=num_replicas, slots=slots)


def teacher_deployment(
    model: ModelConfig, path: str, *, chunk_tokens: int, num_replicas: int, slots: Slots
) -> Any:
    spec = ActorSpec("teacher", TeacherActor, (model, path, chunk_tokens))
    return proxy_deployment(spec, num_replicas=num_replicas, slots=slots)
