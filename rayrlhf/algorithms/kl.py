"""Per-token estimates of KL(policy || reference), and the controllers of their coefficient β.

Estimators: Schulman, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html), from
Δ = logprobs - ref_logprobs at the tokens the policy sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked
from rayrlhf.algorithms.registry import KL_ESTIMATORS

MAX_EXPONENT = (
    10.0  # e^10 = 22026: beyond it k3 grows linearly, so that one outlier token cannot dominate the batch
)
MAX_RELATIVE_ERROR = 0.2  # of the adaptive controller


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Δ, [T] in fp32: unbiased, may be negative. For rewards; as a loss its expected gradient is zero."""
    return logprobs.float() - ref_logprobs.float()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Δ²/2, [T] in fp32: biased as a value, but its gradient is an unbiased one of the KL."""
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-Δ) - 1 + Δ, [T] in fp32, Δ clamped at ±10 inside exp: unbiased and never negative."""
    delta = k1(logprobs, ref_logprobs)
    # expm1 keeps the digits that exp(x) - 1 loses near 0, where a policy close to its reference lives.
    return torch.expm1(-delta.clamp(-MAX_EXPONENT, MAX_EXPONENT)) + delta


def token_kl(name: str, logprobs: Tensor, ref_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Estimator `name` on masked tokens and 0 elsewhere, [T] in fp32.

    The inputs are masked before the estimator sees them: masking k2 or k3 afterwards would keep a NaN out of
    the value but not out of the gradient. Raises `ValueError` for an unknown name.
    """
    if name not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={name!r} is not one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[name].function(masked(logprobs, loss_mask), masked(ref_logprobs, loss_mask))


@dataclass
class FixedKL:
    """A constant coefficient β. A resumed run takes it from its config, not from the checkpoint."""

    coef: float

    def update(self, mean_kl: float, num_samples: int) -> None:
        """No-op, for the interface of `KLController`."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keeps the config's coefficient."""


@dataclass
class AdaptiveKL:
    """Adapts β so that the KL stays near `target` (Ziegler et al. 2019, arXiv 1909.08593).

    β ← β · (1 + clip(KL/target - 1, ±0.2) · n/horizon), with n the samples (responses) of the step. `target`
    is in the unit of `mean_kl`, `horizon` in samples. Raises `ValueError` for settings with which β cannot
    adapt.
    """

    coef: float
    target: float
    horizon: int

    def __post_init__(self) -> None:
        if self.coef <= 0 or self.target <= 0 or self.horizon <= 0:
            raise ValueError(
                f"adaptive KL needs coef, target and horizon > 0, got coef={self.coef}, "
                f"target={self.target}, horizon={self.horizon} (a coefficient of 0 would stay 0 for ever)"
            )

    def update(self, mean_kl: float, num_samples: int) -> None:
        """Update β after a step. A NaN KL leaves β unchanged: such a step is counted as bad elsewhere.

        Raises `ValueError` when one step has so many samples that β could reach 0 or change its sign.
        """
        if MAX_RELATIVE_ERROR * num_samples >= self.horizon:
            raise ValueError(
                f"adaptive KL: {num_samples} samples per step with horizon={self.horizon} could turn the "
                f"coefficient negative; the horizon must be > {MAX_RELATIVE_ERROR * num_samples:g} samples"
            )
        if math.isnan(mean_kl):
            return
        error = min(max(mean_kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


KLController: TypeAlias = FixedKL | AdaptiveKL
