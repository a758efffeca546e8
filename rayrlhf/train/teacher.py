"""Teacher backends for knowledge distillation: a frozen copy in the worker, or Serve replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rayrlhf.batch import PackedBatch
from rayrlhf.config.supervised import KdRunConfig
from rayrlhf.models.distill import Teacher as TeacherAnswer
from rayrlhf.models.distill import TeacherTopK
from rayrlhf.models.load import load_teacher
from rayrlhf.train.frozen_server import ask_all


class Teacher(Protocol):
    def answers(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        """The teacher's distribution at every loss token, one answer per micro-batch."""
        ...


class LocalTeacher:
    """A full copy in every worker, whatever the ZeRO stage: its output projection is needed while the student
    is trained.
    """

    def __init__(self, config: KdRunConfig, device: torch.device) -> None:
        self.model = load_teacher(
            config.model, config.teacher.path, device=device, chunk_tokens=config.train.logprob_chunk_tokens
        ).to(device)

    def answers(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        return [self.model(b.input_ids, b.position_ids, b.cu_seqlens, b.loss_mask) for b in batches]


class ServedTeacher:
    """Client of a teacher deployment: the top k among the tokens of a student with `student_size` logits."""

    def __init__(self, handle: Any, *, top_k: int, student_size: int, timeout_seconds: float) -> None:
        self.handle = handle
        self.top_k = top_k
        self.student_size = student_size
        self.timeout_seconds = timeout_seconds

    def answers(self, batches: Sequence[PackedBatch]) -> list[TeacherAnswer]:
        limits = (self.top_k, self.student_size)
        answers = ask_all(self.handle, "top_k", batches, *limits, timeout_seconds=self.timeout_seconds)
        return [
            TeacherTopK(*(tensor.to(batch.input_ids.device) for tensor in answer))
            for answer, batch in zip(answers, batches, strict=True)
        ]
