"""Running mean and variance over all values seen so far on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]  # element-wise; the same tensor on every rank

EPSILON = 1e-8  # added to the variance


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations from the mean, of K quantities. All float64."""

    count: Tensor  # [K]
    mean: Tensor  # [K]
    m2: Tensor  # [K]

    @classmethod
    def none_yet(cls, num_quantities: int) -> RunningMoments:
        zero = torch.zeros(num_quantities, dtype=torch.float64)
        return cls(zero, zero, zero)

    def merged(self, other: RunningMoments) -> RunningMoments:
        """The moments of both sets of values together.

        δ = mean_b − mean_a;  mean = mean_a + δ·n_b/n;  M2 = M2_a + M2_b + δ²·n_a·n_b/n
        (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").
        """
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        delta = other.mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta**2 * self.count * share,
        )

    def normalized(self, values: Tensor) -> Tensor:
        """(x − mean) / sqrt(M2/n + 1e-8), with the population variance, of `values` [N, K].

        Before any value has been seen, values are returned unchanged.
        """
        variance = self.m2 / self.count.clamp(min=1)
        scaled = (values - self.mean) / (variance + EPSILON).sqrt()
        return torch.where(self.count > 0, scaled, values)


def batch_moments(values: Tensor, sum_over_ranks: SumOverRanks) -> RunningMoments:
    """The moments of `values` [N, K] of all ranks; N may differ between ranks and be 0. Collective.

    Two passes, since the collective can only sum: the mean first, then the deviations from it. The second
    corrects the rounding of the first (Chan et al., the corrected two-pass algorithm).
    """
    values = values.to(torch.float64)
    size = torch.full_like(values[:1].sum(0), values.shape[0])
    count, total = sum_over_ranks(torch.stack([size, values.sum(0)]))
    per_value = count.clamp(min=1)
    mean = total / per_value
    deviations = values - mean
    rest, squares = sum_over_ranks(torch.stack([deviations.sum(0), deviations.square().sum(0)]))
    return RunningMoments(
        count=count, mean=mean + rest / per_value, m2=(squares - rest**2 / per_value).clamp(min=0)
    )
