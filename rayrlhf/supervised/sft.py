"""Supervised fine-tuning and continued pretraining: the mean negative log-likelihood of the loss tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rayrlhf.algorithms.aggregate import sequence_counts, sequence_sums
from rayrlhf.algorithms.metrics import Mean
from rayrlhf.batch import ExampleBatch
from rayrlhf.models.dropout import TrainedModule, keep_dropout
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.load import load_policy
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.supervised.task import Measured, Task


class LanguageModelTask(Task):
    """Trains a causal language model; subclasses define the loss."""

    def load_module(self) -> TrainedModule:
        config = self.config
        return load_policy(
            config.model,
            config.model.path,
            device=self.device,
            chunk_tokens=config.train.logprob_chunk_tokens,
        )

    def decoder_of(self, module: Any) -> Any:
        return module.causal_lm

    def forward(self, module: Any, batch: ExampleBatch) -> Any:
        tokens = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
        return module(*tokens, images=batch.images, prefixes=batch.prefixes)

    def export(self, path: Path) -> None:
        causal_lm = self.learner.module.causal_lm
        first = self.ranks.rank == 0
        state = self.learner.state_dict(causal_lm, on_this_rank=first)
        adapter = self.learner.trained_adapter(causal_lm, self.config.model, on_this_rank=first)
        if first:
            export_causal_lm(causal_lm, state, self.tokenizer(), path, adapter=adapter)


class SftTask(LanguageModelTask):
    """Σ -log p / loss tokens of the step: every token has the same weight, whatever its sequence's length."""

    def load_module(self) -> TrainedModule:
        module = super().load_module()
        if self.config.train.dropout:
            keep_dropout(module)
        return module

    def weights(self, batch: ExampleBatch) -> Tensor:
        return sequence_counts(batch.loss_mask, batch.cu_seqlens)

    def measure(self, output: TokenLogprobs, batch: ExampleBatch) -> Measured:
        tokens = self.weights(batch)
        nll = -sequence_sums(output.logprobs, batch.loss_mask, batch.cu_seqlens)
        entropy = sequence_sums(output.entropy.detach(), batch.loss_mask, batch.cu_seqlens)
        return Measured(Mean(nll, tokens), {"loss/entropy": Mean(entropy, tokens)})
