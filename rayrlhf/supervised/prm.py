"""Process reward models: every step of a solution is scored at the marker that ends it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.aggregate import sequence_counts
from rayrlhf.algorithms.metrics import Mean
from rayrlhf.algorithms.reward_losses import prm
from rayrlhf.batch import ExampleBatch, sequence_ids_of
from rayrlhf.config.supervised import PrmRunConfig
from rayrlhf.data.chat import single_token
from rayrlhf.models.export import export_step_model
from rayrlhf.models.load import load_step_model
from rayrlhf.supervised.task import Measured, Task


class StepRewardTask(Task):
    config: PrmRunConfig

    loads_in_parts = False  # its head starts from rows of the output projection

    def load_module(self) -> nn.Module:
        words = self.config.algorithm.reward_tokens
        ids = None
        if words is not None:
            bad, good = (single_token(word, self.tokenizer()) for word in words)
            ids = (bad, good)
        return load_step_model(
            self.config.model, self.config.model.path, device=self.device, reward_token_ids=ids
        )

    def forward(self, module: nn.Module, batch: ExampleBatch) -> Tensor:
        """Logits [N, 2] at the N step markers."""
        tokens = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
        return module(*tokens, prefixes=batch.prefixes)

    def weights(self, batch: ExampleBatch) -> Tensor:
        return sequence_counts(batch.loss_mask, batch.cu_seqlens)

    def measure(self, output: Tensor, batch: ExampleBatch) -> Measured:
        marked = batch.loss_mask > 0
        example_of_step = sequence_ids_of(batch.cu_seqlens)[marked]
        per_step, metrics = prm(output, batch.targets[marked])

        def per_example(values: Tensor) -> Tensor:
            nothing = torch.zeros(batch.num_sequences, dtype=torch.float32, device=values.device)
            return nothing.index_add(0, example_of_step, values)

        sums = {key: per_example(value) for key, value in metrics.items()}
        return Measured(
            Mean(per_example(per_step), self.weights(batch)),
            {
                "reward/accuracy": Mean(sums["good_right"] + sums["bad_right"], sums["good"] + sums["bad"]),
                "reward/accuracy_good": Mean(sums["good_right"], sums["good"]),
                "reward/accuracy_bad": Mean(sums["bad_right"], sums["bad"]),
            },
        )

    def export(self, path: Path) -> None:
        first = self.ranks.rank == 0
        module = self.learner.module
        state = self.learner.state_dict(module, on_this_rank=first)
        adapter = self.learner.trained_adapter(module, self.config.model, on_this_rank=first)
        step_token = self.config.data.step_token
        if first:
            export_step_model(module, state, self.tokenizer(), path, step_token=step_token, adapter=adapter)
