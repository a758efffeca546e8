"""Preference learning from pairs: DPO, IPO, cDPO, ORPO, SimPO."""

from __future__ import annotations

from torch import Tensor

from rayrlhf.algorithms.aggregate import sequence_counts, sequence_sums
from rayrlhf.algorithms.preference_losses import PREFERENCE_LOSSES, chosen_nll
from rayrlhf.batch import ExampleBatch
from rayrlhf.config.supervised import DpoRunConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.supervised.reference_table import FrozenReference
from rayrlhf.supervised.sft import LanguageModelTask
from rayrlhf.supervised.task import Measured, MicroBatches, TaskSetting, mean_over, real_examples


class PreferenceTask(LanguageModelTask):
    config: DpoRunConfig

    def __init__(self, setting: TaskSetting) -> None:
        super().__init__(setting)
        ref = self.config.ref
        self.reference = FrozenReference(self.config, ref, self.learner) if ref is not None else None

    def prepare(self, micro_batches: MicroBatches, split: str) -> list[ExampleBatch]:
        batches = super().prepare(micro_batches, split)
        return batches if self.reference is None else self.reference.added(batches, split)

    def weights(self, batch: ExampleBatch) -> Tensor:
        return real_examples(batch, 2)

    def measure(self, output: TokenLogprobs, batch: ExampleBatch) -> Measured:
        pairs = self.weights(batch)
        sums = sequence_sums(output.logprobs, batch.loss_mask, batch.cu_seqlens).view(-1, 2)
        tokens = sequence_counts(batch.loss_mask, batch.cu_seqlens).view(-1, 2)
        ref_chosen, ref_rejected = (
            (None, None) if batch.ref_sums is None else batch.ref_sums.view(-1, 2).unbind(-1)
        )
        algorithm = self.config.algorithm
        loss, metrics = PREFERENCE_LOSSES[algorithm.loss](
            sums[:, 0],
            sums[:, 1],
            ref_chosen,
            ref_rejected,
            tokens[:, 0],
            tokens[:, 1],
            beta=algorithm.beta,
            label_smoothing=algorithm.label_smoothing,
            gamma=algorithm.gamma,
        )
        nll = chosen_nll(sums[:, 0], tokens[:, 0])
        if algorithm.nll_coef:
            loss = loss + algorithm.nll_coef * nll
        metrics = metrics | {"loss/nll": nll.detach()}
        return Measured(
            mean_over(loss, pairs), {key: mean_over(value, pairs) for key, value in metrics.items()}
        )
