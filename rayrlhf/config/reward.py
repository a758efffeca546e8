"""`reward`: sources of a sample's score, and how their scores are combined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from rayrlhf.config.base import Count, Fraction, NaturalNumber, PositiveNumber, Problem, Section
from rayrlhf.config.reward_sources import (
    EnvironmentSource,
    FunctionSource,
    MathSource,
    ModelSource,
    ReasoningGymSource,
    RemoteSource,
    RewardSourceConfig,
)

if TYPE_CHECKING:
    from rayrlhf.config.policy import PolicyRunConfig

__all__ = [
    "EnvironmentSource",
    "FunctionSource",
    "MathSource",
    "ModelSource",
    "OverlongConfig",
    "ReasoningGymSource",
    "RemoteSource",
    "RewardConfig",
    "RewardSourceConfig",
    "check_reward_needs",
]

# YAML has lists, no tuples.
Pair = Annotated[tuple[float, float], Field(strict=False)]


class OverlongConfig(Section):
    buffer_tokens: Count
    """The penalty begins this many tokens before the limit of responses, and is full at the limit."""
    factor: PositiveNumber = 1.0
    """The full penalty, taken off the score."""


def _names_differ(reward: RewardConfig) -> Problem | None:
    names = reward.source_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if not twice:
        return None
    return Problem(
        "sources",
        got=f"more than one source with the name {' and '.join(twice)}",
        wanted="a different name for each source: metrics are keyed by name",
        fix="rename one of them (a source without a name is called reward0, reward1, … by its index)",
    )


def _clip_is_a_range(reward: RewardConfig) -> Problem | None:
    if reward.clip is None or reward.clip[0] < reward.clip[1]:
        return None
    return Problem(
        "clip",
        got=f"[{reward.clip[0]:g}, {reward.clip[1]:g}]",
        wanted="[lowest, highest] with lowest < highest",
        fix="swap the two numbers, or make them differ",
    )


def _penalty_survives_the_clip(reward: RewardConfig) -> Problem | None:
    clip, penalty = reward.clip, reward.truncation_penalty
    if clip is None or penalty is None or clip[0] >= clip[1] or clip[0] <= penalty <= clip[1]:
        return None
    return Problem(
        "truncation_penalty",
        got=f"{penalty:g} with clip=[{clip[0]:g}, {clip[1]:g}]",
        wanted="a score within reward.clip, which is applied last",
        fix="move it into the range, or widen reward.clip",
    )


def _requests_end_before_the_deadline(reward: RewardConfig) -> Problem | None:
    for index, source in enumerate(reward.sources):
        own = getattr(source, "timeout_seconds", None)
        if own is not None and own >= reward.timeout_seconds:
            return Problem(
                f"sources.{index}.timeout_seconds",
                got=f"{own:g} with reward.timeout_seconds={reward.timeout_seconds:g}",
                wanted="less than reward.timeout_seconds, which includes time in the queue",
                fix="raise reward.timeout_seconds (to some times as much), or lower the source's own",
            )
    return None


class RewardConfig(Section):
    sources: list[RewardSourceConfig] = Field(min_length=1)
    """Reward sources; the score is their weighted sum."""
    overlong: OverlongConfig | None = None
    """Soft penalty on responses that come close to the limit (DAPO, arXiv 2503.14476)."""
    truncation_penalty: float | None = None
    """Score of a response that hit the token limit; null keeps its own."""
    clip: Pair | None = None
    """Lowest and highest score, to which scores are clipped last."""
    max_failed_fraction: Fraction = 0.1
    """The run stops when more than this share of a step's samples cannot be scored."""
    retries: NaturalNumber = 2
    """How often a failed sample is scored again before it is dropped."""
    timeout_seconds: PositiveNumber = 60
    """Deadline of scoring a sample once, time in the queue included."""

    checks = (_names_differ, _clip_is_a_range, _penalty_survives_the_clip, _requests_end_before_the_deadline)

    @property
    def source_names(self) -> list[str]:
        """One per source: what it is called in logs and metrics."""
        return [source.name or f"reward{index}" for index, source in enumerate(self.sources)]


def check_reward_needs(config: PolicyRunConfig) -> Problem | None:
    """Check what reward sources need of other sections; one of the run config's checks."""
    indices = [i for i, source in enumerate(config.reward.sources) if source.type == "math"]
    if not indices or config.data.label_key is not None:
        return None
    return Problem(
        "data.label_key",
        got=f"null with reward.sources.{indices[0]}.type=math",
        wanted="the column with the reference answer",
        fix="set data.label_key to its name",
    )
