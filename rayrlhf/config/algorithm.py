"""`algorithm`: the mathematics of a policy update; formulas in rayrlhf.algorithms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from rayrlhf.algorithms.registry import (
    AGGREGATIONS,
    ESTIMATORS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    ROLLOUT_CORRECTIONS,
    WEIGHT_LEVELS,
    Entry,
    Estimator,
    PolicyLoss,
)
from rayrlhf.config.base import (
    Count,
    Fraction,
    Meanings,
    NaturalNumber,
    NonNegativeNumber,
    PositiveNumber,
    Problem,
    Section,
    Wanted,
)

LossOptions = Annotated[dict[str, float], Wanted("a mapping of names to numbers")]

if TYPE_CHECKING:
    AdvantageName = LossName = AggregationName = KLEstimatorName = CorrectionMode = WeightLevel = str
else:

    def _names(table: dict[str, Entry]) -> Any:
        """The names of a table, with their meanings for `--help`."""
        meanings = {name: f"{entry.summary} ({entry.paper})" for name, entry in table.items()}
        return Annotated[Literal[tuple(table)], Meanings(meanings)]

    AdvantageName = _names(ESTIMATORS)
    LossName = _names(POLICY_LOSSES)
    AggregationName = _names(AGGREGATIONS)
    KLEstimatorName = _names(KL_ESTIMATORS)
    CorrectionMode = _names(ROLLOUT_CORRECTIONS)
    WeightLevel = _names(WEIGHT_LEVELS)


def _adaptive_kl_has_a_target(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.kl_controller != "adaptive" or algorithm.kl_target is not None:
        return None
    return Problem(
        "kl_target",
        got="null with kl_controller=adaptive",
        wanted="a target for the controller to steer to",
        fix="set algorithm.kl_target (for example 0.05), or algorithm.kl_controller to fixed",
    )


def _kl_target_is_used(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.kl_target is None or algorithm.kl_controller == "adaptive":
        return None
    return Problem(
        "kl_target",
        got=f"{algorithm.kl_target:g} with kl_controller=fixed",
        wanted="no target: a fixed coefficient steers to none",
        fix="set algorithm.kl_controller to adaptive, or remove algorithm.kl_target",
    )


def _adaptive_kl_can_move(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.kl_controller != "adaptive" or algorithm.kl_coef > 0:
        return None
    return Problem(
        "kl_coef",
        got="0 with kl_controller=adaptive",
        wanted="a number > 0: the controller multiplies it, and 0 stays 0",
        fix="set algorithm.kl_coef above 0, or algorithm.kl_controller to fixed",
    )


def _dual_clip_has_a_ratio(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.dual_clip is None or "dual_clip" in algorithm.loss.reads:
        return None
    bounding = " and ".join(name for name, loss in POLICY_LOSSES.items() if "dual_clip" in loss.reads)
    return Problem(
        "dual_clip",
        got=f"{algorithm.dual_clip:g} with policy_loss={algorithm.policy_loss}",
        wanted=f"null: only policy_loss={bounding} bound the loss by a clipped ratio",
        fix="set algorithm.policy_loss to ppo, or remove algorithm.dual_clip",
    )


def _no_ratio_is_on_policy(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.loss.has_ratio or algorithm.updates_per_batch == 1:
        return None
    return Problem(
        "updates_per_batch",
        got=f"{algorithm.updates_per_batch} with policy_loss={algorithm.policy_loss}",
        wanted="1: without a ratio, in a second pass the batch would count as samples of the new policy",
        fix="set algorithm.updates_per_batch to 1, or algorithm.policy_loss to ppo",
    )


def _no_ratio_takes_one_step(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.loss.has_ratio or algorithm.mini_batches == 1:
        return None
    return Problem(
        "mini_batches",
        got=f"{algorithm.mini_batches} with policy_loss={algorithm.policy_loss}",
        wanted="1: without a ratio, mini-batches after the first would count as samples of the new policy",
        fix="set algorithm.mini_batches to 1, or algorithm.policy_loss to ppo",
    )


def _loss_options_are_the_loss_s(algorithm: AlgorithmConfig) -> Problem | None:
    known = algorithm.loss.options
    unknown = sorted(algorithm.loss_options.keys() - known.keys())
    if not unknown:
        return _loss_options_are_positive(algorithm)
    return Problem(
        f"loss_options.{unknown[0]}",
        got=f"{algorithm.loss_options[unknown[0]]:g} with policy_loss={algorithm.policy_loss}",
        wanted=f"one of {', '.join(known)}" if known else "nothing: this loss has no options",
        fix=f"remove algorithm.loss_options.{unknown[0]}",
    )


def _loss_options_are_positive(algorithm: AlgorithmConfig) -> Problem | None:
    bad = next((key for key, value in algorithm.loss_options.items() if not 0 < value < math.inf), None)
    if bad is None:
        return None
    return Problem(
        f"loss_options.{bad}",
        got=f"{algorithm.loss_options[bad]:g}",
        wanted="a finite number > 0",
        fix=f"raise algorithm.loss_options.{bad}, or remove it ({algorithm.loss.options[bad]:g} then)",
    )


def _sequence_ratios_weigh_sequences(algorithm: AlgorithmConfig) -> Problem | None:
    if not algorithm.loss.one_ratio_per_sequence or algorithm.aggregation == "sequence_mean":
        return None
    if "aggregation" not in algorithm.model_fields_set:
        return None  # it gets its default when all else is valid
    return Problem(
        "aggregation",
        got=f"{algorithm.aggregation} with policy_loss={algorithm.policy_loss}",
        wanted="sequence_mean: one ratio per sequence belongs to one term per sequence",
        fix="remove algorithm.aggregation, or set it to sequence_mean",
    )


def _kl_loss_has_a_gradient(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.kl_in != "loss" or algorithm.kl_estimator != "k1" or algorithm.kl_coef == 0:
        return None
    return Problem(
        "kl_estimator",
        got="k1 with kl_in=loss",
        wanted="k2 or k3: the expected gradient of k1 is zero, so the policy would drift freely",
        fix="set algorithm.kl_estimator to k2, or algorithm.kl_in to reward",
    )


def _critic_warmup_has_a_critic(algorithm: AlgorithmConfig) -> Problem | None:
    if algorithm.critic_warmup_steps == 0 or algorithm.estimator.needs_critic:
        return None
    return Problem(
        "critic_warmup_steps",
        got=f"{algorithm.critic_warmup_steps} with advantage={algorithm.advantage}",
        wanted="0: only advantage=gae has a critic to warm up",
        fix="set algorithm.advantage to gae, or remove algorithm.critic_warmup_steps",
    )


def _truncation_has_no_low_end(correction: RolloutCorrectionConfig) -> Problem | None:
    if correction.mode == "mask" or correction.low == 0:
        return None
    return Problem(
        "low",
        got=f"{correction.low:g} with mode=truncate",
        wanted="0: truncation bounds weights from above only",
        fix="remove algorithm.rollout_correction.low, or set algorithm.rollout_correction.mode to mask",
    )


class RolloutCorrectionConfig(Section):
    mode: CorrectionMode = "truncate"
    """How weights are bounded."""
    level: WeightLevel = "token"
    """What an importance weight is of."""
    low: Fraction = 0.0
    """Smallest weight that is kept (mode: mask)."""
    high: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight."""

    checks = (_truncation_has_no_low_end,)


def _reward_range_is_a_range(sampling: DynamicSamplingConfig) -> Problem | None:
    if sampling.low is None or sampling.high is None or sampling.low < sampling.high:
        return None
    return Problem(
        "low",
        got=f"{sampling.low:g} with high={sampling.high:g}",
        wanted="less than high: groups with a mean reward strictly between the two are kept",
        fix="lower algorithm.dynamic_sampling.low or raise algorithm.dynamic_sampling.high",
    )


class DynamicSamplingConfig(Section):
    source: str | None = None
    """Name of the reward source that judges a group; null: the weighted sum of all. Raw, before penalties."""
    low: float | None = None
    """Groups whose mean raw reward is this or less are dropped too; null: only those of equal rewards."""
    high: float | None = None
    """Groups whose mean raw reward is this or more are dropped too; null: only those of equal rewards."""
    max_prompt_batches: Count = 4
    """Prompt batches of rollout.prompts_per_step per step at most; then the step uses the groups it has."""

    checks = (_reward_range_is_a_range,)


class AlgorithmConfig(Section):
    advantage: AdvantageName = "gae"
    """Advantage estimator."""
    policy_loss: LossName = "ppo"
    """Policy objective."""
    aggregation: AggregationName = "token_mean"
    """Reduction of the per-token losses; left out, sequence_mean with policy_loss=gspo."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The ratio is clipped below 1 - clip_low; left out, 3e-4 with policy_loss=gspo."""
    clip_high: NonNegativeNumber = 0.2
    """The ratio is clipped above 1 + clip_high; left out, 4e-4 with policy_loss=gspo."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of tokens with a negative advantage (> 1); null switches it off."""
    loss_options: Annotated[dict[str, float], Wanted("a mapping of names to numbers")] = Field(
        default_factory=dict
    )
    """Numbers that only this policy_loss has, by name; left out, those of its paper."""
    rollout_correction: RolloutCorrectionConfig | None = None
    """Importance weights for the mismatch of engine and trainer, or of old and new weights; null is off."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Drop groups whose raw rewards are all equal and sample more prompts (DAPO); null keeps every group."""
    kl_coef: NonNegativeNumber = 0.01
    """Coefficient of the KL to the reference; 0 runs without a reference."""
    kl_estimator: KLEstimatorName = "k1"
    """Per-token KL estimator, of Δ = logp − ref_logp."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL goes: subtracted from each token's reward, or added to the loss."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Keep kl_coef, or steer it towards kl_target."""
    kl_target: PositiveNumber | None = None
    """Mean KL per token that the adaptive controller aims at."""
    kl_horizon: Count = 10_000
    """Samples over which the adaptive controller corrects."""
    entropy_coef: NonNegativeNumber = 0.0
    """Coefficient of the entropy bonus."""
    whiten_advantages: bool = True
    """Whiten advantages over the global batch (estimators that whiten)."""
    updates_per_batch: Count = 1
    """Passes over each batch of rollouts (PPO epochs)."""
    mini_batches: Count = 1
    """Optimizer steps per pass over a full batch; fewer where samples were dropped."""
    critic_warmup_steps: NaturalNumber = 0
    """First steps that train the critic alone; the actor and its learning-rate schedule start after them."""
    ema_beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a moving average of the actor's weights, exported alongside them; null: none."""
    ptx_coef: NonNegativeNumber = 0.0
    """Coefficient of the language-model loss on data.ptx (PPO-ptx)."""

    checks = (
        _adaptive_kl_has_a_target,
        _kl_target_is_used,
        _adaptive_kl_can_move,
        _dual_clip_has_a_ratio,
        _no_ratio_is_on_policy,
        _no_ratio_takes_one_step,
        _loss_options_are_the_loss_s,
        _sequence_ratios_weigh_sequences,
        _kl_loss_has_a_gradient,
        _critic_warmup_has_a_critic,
    )

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.advantage]

    @property
    def loss(self) -> PolicyLoss:
        return POLICY_LOSSES[self.policy_loss]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, values: Any) -> Any:
        loss = POLICY_LOSSES.get(str(values.get("policy_loss"))) if isinstance(values, dict) else None
        return values if loss is None else {**loss.defaults, **values}
