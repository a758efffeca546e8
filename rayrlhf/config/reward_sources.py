"""The kinds of reward sources: what one entry of `reward.sources` may be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, PositiveNumber, Section, Wanted
from rayrlhf.config.model import Dtype

FunctionName = Annotated[
    str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$"), Wanted("module:function or path/to/file.py:function")
]
SourceName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._-]+$"), Wanted("letters, digits, '.', '_' and '-': it is part of keys")
]
Url = Annotated[
    str, Field(pattern=r"^https?://[^/\s?#@]+[^\s]*$"), Wanted("http://host:port/path or https://…")
]
Headers = Annotated[dict[str, str], Wanted("a mapping of header names to texts")]


class Source(Section):
    """What every source has."""

    weight: float = 1.0
    """Weight in the sum of sources."""
    name: SourceName | None = None
    """Name in logs and metrics; reward0, reward1, … when left out."""
    normalize: bool = False
    """Subtract the running mean of its rewards and divide by their running standard deviation."""


class FunctionSource(Source):
    type: Literal["function"]
    """A Python function of yours: f(prompts, responses, labels, **columns) -> one number per response."""
    function: FunctionName
    """`module:function` or `path/file.py:function`."""
    num_replicas: Count = 1
    """Serve replicas of this source."""


class ModelSource(Source):
    type: Literal["model"]
    """A reward model."""
    path: str = Field(min_length=1)
    """Folder or hub id of an AutoModelForSequenceClassification checkpoint with one label."""
    num_replicas: Count = 1
    """Serve replicas of this source."""
    max_tokens_per_batch: Count = 8192
    """Tokens per forward pass."""
    dtype: Dtype = "auto"
    """Dtype of its weights."""


class RemoteSource(Source):
    type: Literal["remote"]
    """A server: POST {"query": […], "prompts": […], "labels": […]} is answered by {"rewards": […]}."""
    urls: list[Url] = Field(min_length=1)
    """Its addresses, asked in turn; a sample that failed goes to the next one."""
    timeout_seconds: PositiveNumber = 30
    """Deadline of one HTTP request."""
    max_batch: Count = 32
    """Samples per request."""
    max_concurrent: Count = 8
    """Requests that a replica has under way at once, shared out over the addresses (at least one each)."""
    headers: Headers | None = None
    """HTTP headers; a value `env:NAME` is read from the driver's environment and stands in no file."""
    num_replicas: Count = 1
    """Serve replicas that send the requests."""


class MathSource(Source):
    type: Literal["math"]
    """Verifiable answers: math-verify compares the response with the answer in the column data.label_key."""
    correct: float = 1.0
    """Reward of a response whose answer equals the label."""
    wrong: float = 0.0
    """Reward of any other response, those without an answer included."""
    timeout_seconds: PositiveNumber = 10
    """Deadline of one comparison; a response that takes longer has failed, since it may be right."""
    num_processes: Count = 1
    """Processes per replica that compare."""
    num_replicas: Count = 1
    """Serve replicas of this source."""


class ReasoningGymSource(Source):
    type: Literal["reasoning_gym"]
    """The scorer of a reasoning-gym data set; rows carry its columns `answer` and `metadata`."""
    dataset: str | None = None
    """Name of the data set; each row's metadata.source_dataset when left out."""
    answer: Literal["tag", "last_line", "whole"] = "tag"
    """What the answer is: the last <answer>…</answer>, the last line with text, or the whole response."""
    timeout_seconds: PositiveNumber = 10
    """Deadline of one scoring; a response that takes longer has failed, since it may be right."""
    num_processes: Count = 1
    """Processes per replica that score."""
    num_replicas: Count = 1
    """Serve replicas of this source."""


class EnvironmentSource(Source):
    type: Literal["environment"]
    """The rewards that rollout.environment gave, added up over an episode."""


RewardSourceConfig = Annotated[
    FunctionSource | ModelSource | RemoteSource | MathSource | ReasoningGymSource | EnvironmentSource,
    Field(discriminator="type"),
]
