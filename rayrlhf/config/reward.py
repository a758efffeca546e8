"""`reward`: what scores a sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, Fraction, NaturalNumber, PositiveNumber, Problem, Section, Wanted
from rayrlhf.config.model import Dtype

FunctionName = Annotated[
    str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$"), Wanted("module:function or path/to/file.py:function")
]


class FunctionSource(Section):
    type: Literal["function"]
    """A Python function of yours: f(prompts, responses, labels, **columns) -> one number per response."""
    function: FunctionName
    """`module:function` or `path/file.py:function`."""
    weight: float = 1.0
    """Weight in the sum of sources."""
    name: str | None = None
    """Name in logs and metrics; reward0, reward1, … when left out."""
    num_replicas: Count = 1
    """Serve replicas of this source."""


class ModelSource(Section):
    type: Literal["model"]
    """A reward model."""
    path: str = Field(min_length=1)
    """Folder of an AutoModelForSequenceClassification checkpoint with one label."""
    weight: float = 1.0
    """Weight in the sum of sources."""
    name: str | None = None
    """Name in logs and metrics; reward0, reward1, … when left out."""
    num_replicas: Count = 1
    """Serve replicas of this source."""
    max_tokens_per_batch: Count = 8192
    """Tokens per forward pass."""
    dtype: Dtype = "auto"
    """Dtype of its weights."""


# YAML has lists, no tuples.
Pair = Annotated[tuple[float, float], Field(strict=False)]

RewardSourceConfig = Annotated[FunctionSource | ModelSource, Field(discriminator="type")]


def _names_differ(reward: RewardConfig) -> Problem | None:
    names = [source.name for source in reward.sources if source.name is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not twice:
        return None
    return Problem(
        "sources",
        got=f"more than one source with the name {' and '.join(twice)}",
        wanted="a name of its own for each source: metrics are kept by name",
        fix="rename one of them",
    )


def _clip_is_a_range(reward: RewardConfig) -> Problem | None:
    if reward.clip is None or reward.clip[0] < reward.clip[1]:
        return None
    return Problem(
        "clip",
        got=f"[{reward.clip[0]:g}, {reward.clip[1]:g}]",
        wanted="[lowest, highest] with lowest < highest",
        fix="swap the two numbers, or set them apart",
    )


class RewardConfig(Section):
    sources: list[RewardSourceConfig] = Field(min_length=1)
    """Reward sources; the score is their weighted sum."""
    clip: Pair | None = None
    """Lowest and highest score; what lies outside is clipped."""
    max_failed_fraction: Fraction = 0.1
    """The run stops when more than this share of a step's samples cannot be scored."""
    retries: NaturalNumber = 2
    """How often a failed sample is scored again before it is dropped."""
    timeout_seconds: PositiveNumber = 60
    """Deadline of one scoring request."""
    truncation_penalty: float | None = None
    """Score of a response that hit the token limit; null leaves its own."""

    checks = (_names_differ, _clip_is_a_range)
