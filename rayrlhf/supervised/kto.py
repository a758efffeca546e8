"""KTO (arXiv 2402.01306): single judged responses, relative to the policy's overall KL from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import sequence_sums
from rayrlhf.algorithms.metrics import Mean
from rayrlhf.algorithms.preference_losses import kto, kto_kl, kto_reference_point
from rayrlhf.batch import ExampleBatch, pack_examples, padding_examples
from rayrlhf.config.supervised import KtoRunConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.samples import Example
from rayrlhf.supervised.reference_table import FrozenReference
from rayrlhf.supervised.sft import LanguageModelTask
from rayrlhf.supervised.task import Measured, MicroBatches, TaskSetting, mean_over, pack_evenly, real_examples


def _only(example: Example, which: int) -> Example:
    return replace(example, sequences=(example.sequences[which],))


@dataclass(frozen=True, kw_only=True)
class KtoBatch(ExampleBatch):
    reference_point: Tensor  # scalar, of the step or the evaluation: an estimate of KL(π || π_ref)


class KtoTask(LanguageModelTask):
    """Every example has its own response and a mismatched one, to another prompt, which is not trained on."""

    config: KtoRunConfig

    def __init__(self, setting: TaskSetting) -> None:
        super().__init__(setting)
        self.reference = FrozenReference(self.config, self.config.ref, self.learner)

    @property
    def measured_sequences(self) -> int:
        return 1

    def prepare(self, micro_batches: MicroBatches, split: str) -> list[ExampleBatch]:
        examples = [example for micro_batch in micro_batches for example in micro_batch]
        # Where rows are chosen so that micro-batches are full, their own responses are what fills them.
        filled = split == "train" and self.config.train.order_depends_on
        own = self._as_planned(micro_batches) if filled else self._packed(examples, 0)
        mismatched = self._packed(examples, 1)
        assert self.reference is not None
        point = self._reference_point(self.reference.added(mismatched, split, sequence=1))
        judged = self.reference.added(own, split, sequence=0)
        return [KtoBatch(**vars(batch), reference_point=point) for batch in judged]

    def _packed(self, examples: Sequence[Example], which: int) -> list[ExampleBatch]:
        chosen = [_only(example, which) for example in examples]
        train = self.config.train
        return pack_evenly(
            chosen, self.ranks, train.max_tokens_per_micro_batch, share_prefixes=train.share_prefixes
        )

    def _as_planned(self, micro_batches: MicroBatches) -> list[ExampleBatch]:
        share = self.config.train.share_prefixes
        packs = [[_only(example, 0) for example in examples] for examples in micro_batches]
        batches = [pack_examples(p, share_prefixes=share) if p else padding_examples(1) for p in packs]
        return [batch.to(self.ranks.device) for batch in batches]

    def _reference_point(self, mismatched: Sequence[ExampleBatch]) -> Tensor:
        """max(0, mean log-ratio) of the mismatched responses of all ranks: an estimate of KL(π || π_ref)."""
        contributions = torch.zeros(2, dtype=torch.float64, device=self.device)
        for output, batch in zip(self.learner.infer(mismatched, self.forward), mismatched, strict=True):
            real = self.weights(batch) > 0
            sums = sequence_sums(output.logprobs, batch.loss_mask, batch.cu_seqlens)
            assert batch.ref_sums is not None
            contributions += kto_kl(sums[real], batch.ref_sums[real])
        return kto_reference_point(self.ranks.sum_tensor(contributions))

    def weights(self, batch: ExampleBatch) -> Tensor:
        return real_examples(batch, 1)

    def measure(self, output: TokenLogprobs, batch: KtoBatch) -> Measured:
        assert batch.ref_sums is not None
        examples = self.weights(batch)
        algorithm = self.config.algorithm
        loss, metrics = kto(
            sequence_sums(output.logprobs, batch.loss_mask, batch.cu_seqlens),
            batch.ref_sums,
            batch.example_values,
            batch.reference_point,
            beta=algorithm.beta,
            desirable_weight=algorithm.desirable_weight,
            undesirable_weight=algorithm.undesirable_weight,
        )
        return Measured(
            mean_over(loss, examples),
            {
                "reward/accuracy": mean_over(metrics["reward/accuracy"], examples),
                "reward/desirable": Mean(
                    metrics["reward/desirable"] * examples, metrics["data/desirable"] * examples
                ),
                "reward/undesirable": Mean(
                    metrics["reward/undesirable"] * examples, metrics["data/undesirable"] * examples
                ),
                "kl/mismatched": mean_over(batch.reference_point.expand_as(examples), examples),
            },
        )
