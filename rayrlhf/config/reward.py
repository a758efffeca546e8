"""`reward`: what scores a sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Section
from rayrlhf.config.model import Dtype


class FunctionSource(Section):
    type: Literal["function"]
    """A Python function of yours."""
    function: str
    """`module:function` or `path/file.py:function`."""
    weight: float = 1.0
    """Weight in the sum of sources."""
    name: str | None = None
    """Name in logs."""
    num_replicas: int = Field(1, ge=1)
    """Serve replicas."""


class ModelSource(Section):
    type: Literal["model"]
    """A reward model."""
    path: str
    """Folder of an AutoModelForSequenceClassification checkpoint with one label."""
    weight: float = 1.0
    """Weight in the sum of sources."""
    name: str | None = None
    """Name in logs."""
    num_replicas: int = Field(1, ge=1)
    """Serve replicas."""
    max_tokens_per_batch: int = Field(8192, ge=1)
    """Tokens per forward pass."""
    dtype: Dtype = "auto"
    """Dtype of its weights."""


RewardSourceConfig = Annotated[FunctionSource | ModelSource, Field(discriminator="type")]


class RewardConfig(Section):
    sources: list[RewardSourceConfig] = Field(min_length=1)
    """Reward sources; the score is their weighted sum."""
    clip: tuple[float, float] | None = None
    """Lowest and highest score."""
    max_failed_fraction: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of a step's samples cannot be scored."""
    retries: int = Field(2, ge=0)
    """How often a failed sample is scored again before it is dropped."""
    timeout_seconds: float = Field(60, gt=0)
    """Deadline of one scoring request."""
    truncation_penalty: float | None = None
    """Score of a response that hit the token limit; null leaves its own."""
