"""Balance loss and load metrics of a mixture-of-experts model over an optimizer step.

The balance loss multiplies each expert's mean probability by the number of rows that all micro-batches of all
ranks send to it. These counts must be known before the first backward pass: with a single micro-batch per
rank they are reduced between its forward and its backward pass, otherwise they are taken from an additional
forward pass without gradient and without head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayrlhf.algorithms.balance_loss import balance_loss, expert_counts
from rayrlhf.algorithms.metrics import Mean, Metrics
from rayrlhf.batch import PackedBatch
from rayrlhf.models.experts import (
    MoeLayer,
    Routed,
    Scoring,
    moe_layers,
    num_experts_of,
    recorded,
    scores_of,
)
from rayrlhf.models.parallel import Share
from rayrlhf.models.router_probe import router_verdict
from rayrlhf.train import collectives


@dataclass(frozen=True)
class ExpertLoad:
    """Rows that a step's micro-batches, or some of them, send to each expert.

    >>> load = ExpertLoad(torch.tensor([[6.0, 2.0, 0.0, 0.0]]), rows=4.0)  # 4 tokens, 2 experts each
    >>> load.max_over_mean, load.unused_fraction
    (3.0, 0.5)
    """

    counts: Tensor  # [L, E] float64
    rows: float  # of all layers: L per token

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(self.counts + other.counts, self.rows + other.rows)

    def over_ranks(self) -> ExpertLoad:
        """Collective."""
        flat = torch.cat([self.counts.flatten(), self.counts.new_tensor([self.rows])])
        total = collectives.sum_over_ranks(flat)
        return ExpertLoad(total[:-1].view_as(self.counts), float(total[-1]))

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean, averaged over layers: 1 is even, E the worst."""
        mean = self.counts.mean(-1).clamp(min=1e-12)
        return float((self.counts.amax(-1) / mean).mean())

    @property
    def unused_fraction(self) -> float:
        """Share of the experts, over layers, without a row."""
        return float((self.counts == 0).double().mean())


class ExpertBalance:
    """The routers of a model, and the coefficient of their balance loss; without layers for a dense model."""

    def __init__(
        self,
        module: Any,
        layers: Sequence[MoeLayer] = (),
        *,
        num_experts: int = 0,
        scoring: Scoring = "softmax",
        coef: float = 0.0,
    ) -> None:
        self.module = module
        self.layers = layers
        self.num_experts = num_experts
        self.scoring: Scoring = scoring
        self.coef = coef

    @staticmethod
    def of(module: nn.Module, coef: float) -> ExpertBalance:
        """Without layers also if the model's way of routing is unknown.

        Raises:
            ValueError: if it has no layers and `coef` is not 0.
        """
        layers = moe_layers(module)
        model = next((each for each in module.modules() if isinstance(each, PreTrainedModel)), None)
        reason = "it has no mixture-of-experts layers"
        if layers and model is not None:
            is_trusted = type(model).__module__.startswith("transformers_modules")  # it is loaded already
            verdict = router_verdict(model.config, trust_remote_code=is_trusted)
            if verdict.scoring is not None:
                num_experts = num_experts_of(layers[0])
                return ExpertBalance(
                    module, layers, num_experts=num_experts, scoring=verdict.scoring, coef=coef
                )
            reason = verdict.reason
        if coef:
            raise ValueError(f"model.aux_loss_coef={coef:g}, but this model has no balance loss: {reason}")
        return ExpertBalance(module)

    def no_load(self) -> ExpertLoad:
        return ExpertLoad(torch.zeros(len(self.layers), self.num_experts, dtype=torch.float64), 0.0)

    @contextmanager
    def recorded(self, batch: PackedBatch) -> Iterator[list[Routed]]:
        """A list that holds, after the context, the decisions of each layer for this rank's real tokens."""
        routed: list[Routed] = []
        with recorded(self.layers) as recorder:
            yield routed
        if self.layers:
            keep = self._real_rows(batch)
            routed += [Routed(*(each[keep] for each in layer)) for layer in recorder.routed()]

    def load(self, routed: Sequence[Routed]) -> ExpertLoad:
        if not routed:
            return self.no_load()
        counts = torch.stack([expert_counts(each.chosen, self.num_experts) for each in routed])
        return ExpertLoad(counts.cpu(), float(sum(len(each.chosen) for each in routed)))

    def start_step(self, load: ExpertLoad | None) -> StepBalance:
        """`load`: of the step over all ranks, if it is known already."""
        return StepBalance(self, load)

    def _real_rows(self, batch: PackedBatch) -> Any:
        """Index of the row of each real token; models may run further passes after them, to stay in step."""
        if batch.is_padding:
            return slice(0, 0)
        if batch.prefixes is not None:  # a row of a shared prefix counts for each of its tokens
            return batch.prefixes.rows
        group = getattr(self.module, "sequence_group", None)
        if group is None:
            return slice(0, batch.num_tokens)
        return Share.of(batch.cu_seqlens, batch.num_tokens, group).positions < batch.num_tokens


class StepBalance:
    """The balance loss and the load of one optimizer step."""

    def __init__(self, experts: ExpertBalance, known: ExpertLoad | None) -> None:
        self.experts = experts
        self.known = known
        self.load = experts.no_load()  # of this rank, so far
        self.loss = 0.0  # this rank's shares, so far, without the coefficient

    @property
    def objective(self) -> float:
        """This rank's share of coefficient · loss."""
        return self.experts.coef * self.loss

    def loss_share(self, routed: Sequence[Routed]) -> Tensor | float:
        """coefficient · a micro-batch's share of the balance loss. Collective if the load was unknown."""
        load = self.experts.load(routed)
        self.load += load
        if not self.experts.coef:
            return 0.0
        share = step_loss(routed, self.known or load.over_ranks(), self.experts.scoring)
        self.loss += share.item()
        return self.experts.coef * share

    def metrics(self, name: str) -> Metrics:
        """Metrics over all ranks. Collective."""
        if not self.experts.layers:
            return Metrics()
        load = self.known or self.load.over_ranks()
        metrics = Metrics()
        if load.rows:
            metrics[f"experts/{name}_load_max"] = Mean(load.max_over_mean, 1.0)
            metrics[f"experts/{name}_unused_fraction"] = Mean(load.unused_fraction, 1.0)
        if self.experts.coef:
            loss = collectives.sum_over_ranks(torch.tensor(self.loss, dtype=torch.float64))
            metrics[f"loss/{name}_balance"] = Mean(float(loss), 1.0)
        return metrics


def step_loss(routed: Sequence[Routed], of_step: ExpertLoad, scoring: Scoring) -> Tensor:
    """A micro-batch's share of the balance loss over all layers."""
    counts, rows = of_step.counts.sum(0), max(of_step.rows, 1.0)
    shares = [balance_loss(scores_of(each.logits, scoring), counts, rows) for each in routed]
    return torch.stack(shares).sum()
