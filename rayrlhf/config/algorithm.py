"""`algorithm`: the mathematics of a policy update; formulas in rayrlhf.algorithms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayrlhf.config.base import Section


class AlgorithmConfig(Section):
    advantage: Literal["gae", "reinforce_pp", "reinforce_pp_baseline", "rloo", "grpo", "dr_grpo"] = "gae"
    """Advantage estimator; gae is PPO with a critic, the others do without one."""
    policy_loss: Literal["ppo", "reinforce"] = "ppo"
    """Policy objective."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum_norm"] = "token_mean"
    """How per-token losses become one number."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of tokens with a negative advantage (> 1); null switches it off."""
    kl_coef: float = Field(0.01, ge=0)
    """Coefficient of the KL to the reference; 0 runs without a reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token KL estimator."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL goes: subtracted from each token's reward, or added to the loss."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Keep kl_coef, or steer it towards kl_target."""
    kl_target: float | None = Field(None, gt=0)
    """Mean KL per token that the adaptive controller aims at."""
    kl_horizon: int = Field(10_000, ge=1)
    """Samples over which the adaptive controller corrects."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus."""
    whiten_advantages: bool = True
    """Whiten advantages over the global batch (estimators that whiten)."""
    updates_per_batch: int = Field(1, ge=1)
    """Passes over each batch of rollouts (PPO epochs)."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    critic_warmup_steps: int = Field(0, ge=0)
    """The actor stays frozen for this many first steps while the critic learns."""
