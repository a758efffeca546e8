"""Metric values that can be merged over micro-batches, optimizer steps and ranks.

A mean is taken over all its items (tokens, sequences, examples or optimizer steps), however they were
batched. The mean of mini-batch means would differ when mini-batches differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked

Number = float | Tensor  # a scalar; `Mean` also holds one number per example, [E], until `summed`


@dataclass(frozen=True)
class Sum:
    """A count, such as optimizer steps that were skipped."""

    total: Number

    def merged(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def result(self) -> float:
        return float(self.total)

    def addends(self) -> tuple[float, ...]:
        return (float(self.total),)

    @staticmethod
    def of(addends: Sequence[float]) -> Sum:
        return Sum(*addends)


@dataclass(frozen=True)
class Mean:
    """Σ total / Σ weight; omitted from the results if the weight is 0."""

    total: Number
    weight: Number

    def merged(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def result(self) -> float | None:
        return float(self.total) / float(self.weight) if float(self.weight) else None

    def addends(self) -> tuple[float, ...]:
        return float(self.total), float(self.weight)

    @staticmethod
    def of(addends: Sequence[float]) -> Mean:
        return Mean(*addends)

    def summed(self) -> Mean:
        """Sums of per-example numbers [E], without gradient."""
        total, weight = torch.as_tensor(self.total), torch.as_tensor(self.weight)
        return Mean(total.detach().sum(), weight.detach().sum())


@dataclass(frozen=True)
class Max:
    """A maximum."""

    value: Number

    def merged(self, other: Max) -> Max:
        return Max(max(float(self.value), float(other.value)))

    def result(self) -> float:
        return float(self.value)


@dataclass(frozen=True)
class ExplainedVariance:
    """1 - Var(R - V)/Var(R) of returns R and values V: 1 is a perfect critic, 0 no better than a constant."""

    sums: tuple[float, ...]  # count, Σ R, Σ R², Σ (R-V), Σ (R-V)²

    # Returns whose variance is this small relative to their mean square differ by rounding only.
    CONSTANT_RETURNS = 1e-12

    def merged(self, other: ExplainedVariance) -> ExplainedVariance:
        return ExplainedVariance(tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    def result(self) -> float:
        """NaN if undefined: no token, or returns without variance."""
        count, total, total_squares, residual, residual_squares = self.sums
        if count == 0:
            return float("nan")
        variance = total_squares / count - (total / count) ** 2
        if variance <= self.CONSTANT_RETURNS * total_squares / count:
            return float("nan")
        return 1.0 - (residual_squares / count - (residual / count) ** 2) / variance

    def addends(self) -> tuple[float, ...]:
        return self.sums

    @staticmethod
    def of(addends: Sequence[float]) -> ExplainedVariance:
        return ExplainedVariance(tuple(addends))


Metric = Sum | Mean | Max | ExplainedVariance


class Metrics(dict[str, Metric]):
    """Metrics by their key in `rayrlhf.observe.metric_keys.METRICS`. `a + b` merges them:

    >>> once = Metrics({"loss/entropy": Mean(total=6.0, weight=4.0), "rollout/logprob_diff_max": Max(0.2)})
    >>> again = Metrics({"loss/entropy": Mean(total=2.0, weight=4.0), "loss/actor_bad_steps": Sum(1.0)})
    >>> (once + again).results()
    {'loss/entropy': 1.0, 'rollout/logprob_diff_max': 0.2, 'loss/actor_bad_steps': 1.0}
    """

    def __add__(self, other: Metrics) -> Metrics:
        """Merge. Raises `TypeError` for a key with two different kinds of metric."""
        merged = Metrics(self)
        for key, metric in other.items():
            merged[key] = merge(key, merged[key], metric) if key in merged else metric
        return merged

    def on_host(self) -> Metrics:
        """With plain numbers in place of tensors, which are copied from their device at once."""
        numbers = {key: _numbers(metric) for key, metric in self.items()}
        tensors = [
            n.detach().double() for of_one in numbers.values() for n in of_one if isinstance(n, Tensor)
        ]
        copied = iter(torch.stack(tensors).tolist() if tensors else ())
        plain = {
            key: [next(copied) if isinstance(n, Tensor) else n for n in of_one]
            for key, of_one in numbers.items()
        }
        return Metrics(
            {
                key: Max(plain[key][0]) if isinstance(metric, Max) else type(metric).of(plain[key])
                for key, metric in self.items()
            }
        )

    def results(self) -> dict[str, float]:
        """The numbers to report; means without items are omitted."""
        results = {key: metric.result() for key, metric in self.items()}
        return {key: result for key, result in results.items() if result is not None}


def _numbers(metric: Metric) -> tuple[Number, ...]:
    match metric:
        case Sum(total):
            return (total,)
        case Mean(total, weight):
            return total, weight
        case Max(value):
            return (value,)
        case ExplainedVariance(sums):
            return sums


def merge(key: str, first: Any, second: Any) -> Metric:
    if type(first) is not type(second):
        raise TypeError(f"metric {key} is a {type(first).__name__} and a {type(second).__name__}")
    return first.merged(second)


def token_mean(per_token: Tensor, loss_mask: Tensor) -> Mean:
    """The mean of `per_token` [T] over the loss tokens."""
    return Mean(masked(per_token.detach(), loss_mask).sum(), loss_mask.sum())
