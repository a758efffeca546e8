"""Base class of supervised tasks: a model, a loss per example, and means over the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.metrics import Mean, Metrics
from rayrlhf.batch import ExampleBatch, pack_examples, padding_examples
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.packing import micro_batches
from rayrlhf.models.load import adapt, checkpoint_activations, resolve_dtype
from rayrlhf.samples import Example
from rayrlhf.supervised.reference_table import FrozenReference, packed
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.deepspeed_engine import loading
from rayrlhf.train.learner import Learner, Term
from rayrlhf.train.sequence_parallel import set_sequence_group

MicroBatches = Sequence[Sequence[Example]]


class Measured(NamedTuple):
    """Loss and metrics of the E examples of a micro-batch; 0 for padding examples."""

    loss: Mean  # the objective [E]; its total has the gradient
    metrics: dict[str, Mean]  # [E] each, without gradient


@dataclass(frozen=True)
class TaskSetting:
    """Arguments from which a task is built."""

    config: Any  # the job's own SupervisedConfig
    ranks: Ranks
    teacher_app: str = ""  # Serve app of the teacher; "" without one


class Task:
    """A model and its loss, on one rank. Subclasses define loading, the forward pass, the loss and the
    export.

    The objective is Σ loss over the examples of a step / Σ weight, whatever micro-batch or rank they are on.
    """

    config: Any  # the job's own SupervisedConfig
    reference: FrozenReference | None = None
    loads_in_parts = True  # under ZeRO-3; False if loading reads weights

    def __init__(self, setting: TaskSetting) -> None:
        self.config = setting.config
        self.ranks = setting.ranks
        self.device = self.ranks.device
        self.dtype = resolve_dtype(self.config.model.dtype, self.device)
        in_parts = self.loads_in_parts and self.config.model.loads_in_parts
        with loading(self.config.train, self.dtype, in_parts=in_parts):
            module = self.load_module()
        adapt(self.config.model, self.decoder_of(module), device=self.device, seed=self.config.run.seed)
        if self.config.train.gradient_checkpointing:
            checkpoint_activations(self.decoder_of(module), offload=self.config.train.activation_offload)
        set_sequence_group(module, self.config.model, self.config.train)
        self.learner = Learner(
            module,
            self.config.train,
            lr=self.config.train.lr,
            dtype=self.dtype,
            name="model",
            aux_loss_coef=self.config.model.aux_loss_coef,
            saves_optimizer=self.config.checkpoint.optimizer,
        )

    # Defined by subclasses

    def load_module(self) -> nn.Module:
        raise NotImplementedError

    def decoder_of(self, module: Any) -> Any:
        """The submodule for LoRA adapters and activation checkpointing."""
        return module.decoder

    def forward(self, module: Any, batch: Any) -> Any:
        raise NotImplementedError

    def weights(self, batch: ExampleBatch) -> Tensor:
        """Weight of each example [E] in the objective; 0 for padding."""
        raise NotImplementedError

    def measure(self, output: Any, batch: Any) -> Measured:
        raise NotImplementedError

    def before_export(self, sample: Callable[[], Iterable[MicroBatches]]) -> None:
        """Hook before the final export; `sample` iterates over some of the training data. Collective."""

    def export(self, path: Path) -> None:
        """Write the trained model as a Hugging Face folder. Collective."""
        raise NotImplementedError

    # Common to all tasks

    def prepare(self, micro_batches: MicroBatches, split: str) -> list[ExampleBatch]:
        """Pack the examples, and add outputs of other models. Collective."""
        return [self._pack(examples) for examples in micro_batches]

    def _pack(self, examples: Sequence[Example]) -> ExampleBatch:
        return packed(examples, self.config).to(self.device)

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
                pairs = torch.stack([torch.as_tensor(mean.total), torch.as_tensor(mean.weight)], dim=-1)[real]
                rows.setdefault(key, []).extend(pairs.double().tolist())
        return rows

    @property
    def measured_sequences(self) -> int:
        """Sequences per example in the batches passed to `measure`."""
        return self.config.data.sequences_per_example

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def tokenizer(self) -> Any:
        model = self.config.model
        return prompt_tokenizer(model.path, model.trust_remote_code, read_chat_template(self.config.data))


@dataclass(frozen=True)
class Objective:
    """Σ loss over examples / `total`, which is `total_weight` of the optimizer step."""

    task: Task
    total: float

    def __call__(self, output: Any, batch: ExampleBatch) -> tuple[Tensor, Metrics]:
        measured = self.task.measure(output, batch)
        metrics = Metrics({key: mean.summed() for key, mean in measured.metrics.items()})
        return torch.as_tensor(measured.loss.total).sum() / self.total, metrics

    def term(self, batches: Sequence[ExampleBatch]) -> Term:
        return Term(batches, self.task.forward, self)


def total_weight(task: Task, batches: Sequence[ExampleBatch], ranks: Ranks) -> float:
    """Total weight of the examples of all ranks, at least 1. Collective."""
    local = torch.stack([task.weights(batch).double().sum() for batch in batches]).sum()
    return max(1.0, float(ranks.sum_tensor(local)))


def pack_evenly(
    examples: Sequence[Example], ranks: Ranks, budget_tokens: int, *, share_prefixes: bool = False
) -> list[ExampleBatch]:
    """Pack this rank's examples, of one sequence each, into micro-batches on its device: equally many, and at
    least one, on every rank. Collective.
    """
    packs = micro_batches([example.num_tokens for example in examples], budget_tokens)
    batches = [pack_examples([examples[i] for i in pack], share_prefixes=share_prefixes) for pack in packs]
    wanted = max(1, int(ranks.max(len(batches))))
    batches += [padding_examples(1)] * (wanted - len(batches))
    return [batch.to(ranks.device) for batch in batches]


def example_ids(batch: ExampleBatch, sequences_per_example: int) -> Tensor:
    """Row ids [E]; -1 for padding."""
    return batch.row_ids.view(-1, sequences_per_example)[:, 0]


def real_examples(batch: ExampleBatch, sequences_per_example: int) -> Tensor:
    """1 for each example [E], 0 for padding."""
    return (example_ids(batch, sequences_per_example) >= 0).float()


def mean_over(values: Tensor, picked: Tensor) -> Mean:
    """The mean of `values` [E] over the examples with `picked` [E] = 1, not 0."""
    return Mean(torch.where(picked > 0, values, 0.0), picked)
