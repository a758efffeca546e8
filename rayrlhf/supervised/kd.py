"""Knowledge distillation: the student imitates the teacher's distribution at every loss token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from ray import serve

from rayrlhf.algorithms.aggregate import sequence_counts, sequence_sums
from rayrlhf.algorithms.metrics import Mean
from rayrlhf.batch import ExampleBatch
from rayrlhf.config.supervised import KdRunConfig
from rayrlhf.models.distill import DistillLogprobs, first_rows
from rayrlhf.models.distill import Teacher as TeacherAnswer
from rayrlhf.models.dropout import TrainedModule, keep_dropout
from rayrlhf.models.load import load_student
from rayrlhf.supervised.sft import LanguageModelTask
from rayrlhf.supervised.task import Measured, MicroBatches, TaskSetting
from rayrlhf.train.teacher import LocalTeacher, ServedTeacher, Teacher


@dataclass(frozen=True, kw_only=True)
class DistillBatch(ExampleBatch):
    teacher: TeacherAnswer  # of the loss tokens

    def without_loss(self) -> Self:
        return replace(super().without_loss(), teacher=first_rows(self.teacher, 0))


class DistillationTask(LanguageModelTask):
    """Σ [(1-c)·(-log p) + c·divergence] / loss tokens of the step."""

    config: KdRunConfig

    def __init__(self, setting: TaskSetting) -> None:
        super().__init__(setting)
        self.teacher = self._teacher(setting)

    def _teacher(self, setting: TaskSetting) -> Teacher:
        teacher = self.config.teacher
        if teacher.location == "worker":
            return LocalTeacher(self.config, self.device)
        handle = serve.get_app_handle(setting.teacher_app)
        return ServedTeacher(
            handle,
            top_k=teacher.top_k,
            student_size=self.learner.module.vocabulary_size,
            timeout_seconds=teacher.timeout_seconds,
        )

    def load_module(self) -> TrainedModule:
        config, algorithm = self.config, self.config.algorithm
        student = load_student(
            config.model,
            config.model.path,
            device=self.device,
            chunk_tokens=config.train.logprob_chunk_tokens,
            divergence=algorithm.divergence,
            beta=algorithm.jsd_beta,
        )
        if config.train.dropout:
            keep_dropout(student)
        return student

    def prepare(self, micro_batches: MicroBatches, split: str) -> list[ExampleBatch]:
        batches = super().prepare(micro_batches, split)
        answers = self.teacher.answers(batches)
        return [
            DistillBatch(**vars(batch), teacher=answer)
            for batch, answer in zip(batches, answers, strict=True)
        ]

    def forward(self, module: Any, batch: Any) -> DistillLogprobs:
        return module(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            batch.loss_mask,
            teacher=batch.teacher,
        )

    def weights(self, batch: ExampleBatch) -> Any:
        return sequence_counts(batch.loss_mask, batch.cu_seqlens)

    def measure(self, output: DistillLogprobs, batch: ExampleBatch) -> Measured:
        tokens = self.weights(batch)
        nll = -sequence_sums(output.logprobs, batch.loss_mask, batch.cu_seqlens)
        divergence = sequence_sums(output.divergence, batch.loss_mask, batch.cu_seqlens)
        coef = self.config.algorithm.kd_coef
        return Measured(
            Mean((1.0 - coef) * nll + coef * divergence, tokens),
            {
                "loss/nll": Mean(nll.detach(), tokens),
                "loss/divergence": Mean(divergence.detach(), tokens),
            },
        )
