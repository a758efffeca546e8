"""What every supervised job learns by: examples in, one number per example out, and means over the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayrlhf.batch import PackedBatch, empty_examples, pack_examples
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.models.load import adapt, checkpoint_activations, resolve_dtype
from rayrlhf.samples import Example
from rayrlhf.train import collectives
from rayrlhf.train.engine import loading
from rayrlhf.train.learner import Learner, Term
from rayrlhf.train.sequence_parallel import share_sequences

MicroBatches = Sequence[Sequence[Example]]


class Mean(NamedTuple):
    """A quantity that is averaged over a step: Σ total / Σ weight, over examples, micro-batches and ranks."""

    total: Tensor  # [E]
    weight: Tensor  # [E]


class Measured(NamedTuple):
    """What came out for the E examples of a micro-batch; fillers have 0 everywhere."""

    loss: Mean  # the objective; its total has the gradient
    metrics: dict[str, Mean]  # without gradient


@dataclass(frozen=True)
class TaskSetting:
    """What a task is made of."""

    config: Any  # the job's own SupervisedConfig
    teacher_app: str = ""  # Serve app of the teacher; "" where there is none


class Task:
    """A model and its loss, on one rank. Subclasses say how to load it, what to ask it, and how to export.

    The objective is Σ loss over the examples of a step / Σ weight, whatever micro-batch or rank they are on.
    """

    config: Any  # the job's own SupervisedConfig
    loads_in_parts = True  # under ZeRO-3; not where loading reads weights

    def __init__(self, setting: TaskSetting) -> None:
        self.config = setting.config
        self.device = collectives.device()
        self.dtype = resolve_dtype(self.config.model.dtype, self.device)
        in_parts = self.loads_in_parts and self.config.model.loads_in_parts
        with loading(self.config.train, self.dtype, in_parts=in_parts):
            module = self.load_module()
        adapt(self.config.model, self.decoder_of(module), device=self.device, seed=self.config.run.seed)
        if self.config.train.gradient_checkpointing:
            checkpoint_activations(self.decoder_of(module))
        share_sequences(module, self.config.model, self.config.train)
        self.learner = Learner(
            module, self.config.train, lr=self.config.train.lr, dtype=self.dtype, name="model"
        )

    # What a job defines

    def load_module(self) -> nn.Module:
        raise NotImplementedError

    def decoder_of(self, module: Any) -> Any:
        """The part whose layers may be adapted, and may recompute their activations."""
        return module.decoder

    def forward(self, module: Any, batch: PackedBatch) -> Any:
        raise NotImplementedError

    def weights(self, batch: PackedBatch) -> Tensor:
        """How much each example [E] weighs in the objective; 0 for fillers."""
        raise NotImplementedError

    def measure(self, output: Any, batch: PackedBatch) -> Measured:
        raise NotImplementedError

    def before_export(self, sample: Callable[[], Iterable[MicroBatches]]) -> None:
        """What is to be known of the trained model; `sample` are some of the training data. Collective."""

    def export(self, path: Path) -> None:
        """Write what users load. Collective."""
        raise NotImplementedError

    # What all jobs do alike

    def prepare(self, micro_batches: MicroBatches, split: str) -> list[PackedBatch]:
        """Pack, and add what other models say of the samples. Collective."""
        return [self._pack(examples) for examples in micro_batches]

    def _pack(self, examples: Sequence[Example]) -> PackedBatch:
        together = self.config.data.sequences_per_example
        return (pack_examples(examples) if examples else empty_examples(together)).to(self.device)

    def update(self, micro_batches: MicroBatches, *, step: int) -> dict[str, float]:
        """One optimizer step; the objective and the means of the step. Collective."""
        batches = self.prepare(micro_batches, "train")
        local = torch.stack([self.weights(batch).double().sum() for batch in batches]).sum()
        total = max(1.0, float(collectives.sum_over_ranks(local)))

        def objective(output: Any, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
            measured = self.measure(output, batch)
            return measured.loss.total.sum() / total, summed(measured.metrics)

        told = self.learner.update(Term(batches, self.forward, objective), step=step)
        return means_of(told)

    @torch.no_grad()
    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """Per example, `row_ids` and [total, weight] of every metric and of the loss. Collective."""
        batches = self.prepare(micro_batches, "eval")
        outputs = self.learner.infer(batches, self.forward)
        rows: dict[str, list[Any]] = {"row_ids": []}
        for output, batch in zip(outputs, batches, strict=True):
            measured = self.measure(output, batch)
            real = example_ids(batch, self.measured_sequences) >= 0
            rows["row_ids"] += example_ids(batch, self.measured_sequences)[real].tolist()
            for key, mean in {"eval/loss": measured.loss, **measured.metrics}.items():
                pairs = torch.stack([mean.total, mean.weight], dim=-1)[real]
                rows.setdefault(key, []).extend(pairs.double().tolist())
        return rows

    @property
    def measured_sequences(self) -> int:
        """Sequences per example in the batches that `measure` is given."""
        return self.config.data.sequences_per_example

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def tokenizer(self) -> Any:
        model = self.config.model
        return prompt_tokenizer(model.path, model.trust_remote_code, read_chat_template(self.config.data))


def example_ids(batch: PackedBatch, sequences_per_example: int) -> Tensor:
    """Row ids [E]; -1 for fillers."""
    assert batch.group_ids is not None
    return batch.group_ids.view(-1, sequences_per_example)[:, 0]


def real_examples(batch: PackedBatch, sequences_per_example: int) -> Tensor:
    """1 for each example [E], 0 for fillers."""
    return (example_ids(batch, sequences_per_example) >= 0).float()


def mean_over(values: Tensor, picked: Tensor) -> Mean:
    """The mean of `values` [E] over the examples that `picked` [E] in {0, 1} says."""
    return Mean(torch.where(picked > 0, values, 0.0), picked)


def summed(metrics: dict[str, Mean]) -> dict[str, Tensor]:
    """Sums that add up over micro-batches and ranks; `means_of` makes means of them again."""
    totals = {key: mean.total.detach().sum() for key, mean in metrics.items()}
    return totals | {f"{key}/weight": mean.weight.sum() for key, mean in metrics.items()}


def means_of(told: dict[str, float]) -> dict[str, float]:
    """Every sum that has a weight becomes a mean; a mean over nothing is left out."""
    weights = {key.removesuffix("/weight"): n for key, n in told.items() if key.endswith("/weight")}
    plain = {key: value for key, value in told.items() if key not in weights and not key.endswith("/weight")}
    return plain | {key: told[key] / n for key, n in weights.items() if n}
