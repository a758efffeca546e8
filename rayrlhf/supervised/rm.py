"""Reward models from pairs: Bradley-Terry on the scores at the last tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.reward_losses import REWARD_LOSSES
from rayrlhf.batch import ExampleBatch
from rayrlhf.config.supervised import RmRunConfig
from rayrlhf.models.export import export_reward_model
from rayrlhf.models.load import load_reward_model
from rayrlhf.reward.reading import INPUT_TEMPLATE, READ_AT
from rayrlhf.supervised.task import Measured, MicroBatches, Task, mean_over, real_examples


class RewardModelTask(Task):
    config: RmRunConfig
    mean: float | None = None  # of the scores, after training
    std: float | None = None

    def load_module(self) -> nn.Module:
        return load_reward_model(self.config.model, self.config.model.path, device=self.device)

    def forward(self, module: nn.Module, batch: ExampleBatch) -> Tensor:
        """Scores [S]."""
        return module(batch.input_ids, batch.position_ids, batch.cu_seqlens, prefixes=batch.prefixes)

    def weights(self, batch: ExampleBatch) -> Tensor:
        return real_examples(batch, 2)

    def measure(self, output: Tensor, batch: ExampleBatch) -> Measured:
        pairs = self.weights(batch)
        chosen, rejected = output.view(-1, 2).unbind(-1)
        margin = batch.example_values.view(-1, 2)[:, 0]
        if not self.config.algorithm.margin:
            margin = torch.zeros_like(margin)
        loss, metrics = REWARD_LOSSES[self.config.algorithm.loss](chosen, rejected, margin)
        return Measured(
            mean_over(loss, pairs), {key: mean_over(value, pairs) for key, value in metrics.items()}
        )

    def before_export(self, sample: Callable[[], Iterable[MicroBatches]]) -> None:
        """Compute mean and standard deviation of training responses' scores, for normalising scores."""
        sums = torch.zeros(3, dtype=torch.float64)
        for micro_batches in sample():
            batches = self.prepare(micro_batches, "train")
            for scores, batch in zip(self.learner.infer(batches, self.forward), batches, strict=True):
                real = scores[batch.row_ids >= 0].double()
                sums += torch.stack([torch.ones_like(real), real, real**2]).sum(-1).cpu()
        count, total, squares = self.ranks.sum_tensor(sums).tolist()
        mean = total / max(count, 1.0)
        self.mean, self.std = mean, math.sqrt(max(squares / max(count, 1.0) - mean**2, 0.0))

    def export(self, path: Path) -> None:
        first = self.ranks.rank == 0
        module = self.learner.module
        state = self.learner.state_dict(module, on_this_rank=first)
        adapter = self.learner.trained_adapter(module, self.config.model, on_this_rank=first)
        reading = {READ_AT: "answer_end"}  # where data.render ends sequences
        data = self.config.data
        if not data.apply_chat_template:
            reading[INPUT_TEMPLATE] = data.input_template or "{}"
        if first:
            export_reward_model(
                module,
                state,
                self.tokenizer(),
                path,
                mean=self.mean,
                std=self.std,
                adapter=adapter,
                reading=reading,
            )
