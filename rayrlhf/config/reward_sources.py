"""The types of reward sources: the entries of `reward.sources`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from rayrlhf.config.base import Count, PositiveNumber, Problem, Section, Wanted
from rayrlhf.config.model import Dtype
from rayrlhf.config.user_code import CodeLimits
from rayrlhf.secrets import is_masked, masked_tree

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
    """Fields of every reward source."""

    weight: float = 1.0
    """Weight in the sum of sources."""
    name: SourceName | None = None
    """Name in logs and metrics; reward0, reward1, … when left out."""
    normalize: bool = False
    """Subtract the running mean of its rewards and divide by their running standard deviation."""


class FunctionLimits(CodeLimits):
    """Limits of a user function."""

    timeout_seconds: PositiveNumber | None = None
    """Deadline of one call, then its process is replaced; 4/5 of the deadline of scoring when left out."""


class FunctionSource(FunctionLimits, Source):
    type: Literal["function"]
    """Your Python function: f(prompts, responses, labels, **columns) -> a number up to 1e18 per response."""
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
    compile: bool = False
    """Compile each of its decoder layers with torch.compile."""
    read_at: Literal["auto", "answer_end", "template_end"] = "auto"
    """Token at which it was trained; auto: as recorded in rayrlhf's exports, else template_end."""


def _secrets_are_there(source: RemoteSource) -> Problem | None:
    """A run's config.yaml has `***` in place of secrets; a server must not be called with that."""
    places = {f"urls.{index}": url for index, url in enumerate(source.urls)}
    places |= {f"headers.{name}": value for name, value in (source.headers or {}).items()}
    for path, value in places.items():
        if is_masked(value):
            return Problem(
                path,
                got=f"{value}, where a secret has been masked",
                wanted="the secret, or ${VARIABLE} to read it from the environment",
                fix="write ${VARIABLE} in its place, and set the variable where the run is started",
            )
    return None


def _one_authorization(source: RemoteSource) -> Problem | None:
    """The HTTP client refuses each request that has both."""
    if not any(name.lower() == "authorization" for name in source.headers or {}):
        return None
    for index, url in enumerate(source.urls):
        if re.match(r"https?://[^/?#]*@", url):
            return Problem(
                f"urls.{index}",
                got="a user in the address in addition to the header Authorization",
                wanted="one of the two: a request has one Authorization",
                fix="remove the user and password from the address, or the header",
            )
    return None


class RemoteSource(Source):
    type: Literal["remote"]
    """A server: POST {"query": […], "prompts": […], "labels": […]} is answered by {"rewards": […]}."""
    urls: list[Url] = Field(min_length=1)
    """Its addresses, used in rotation; `${VARIABLE}` in one is read from the driver's environment."""
    timeout_seconds: PositiveNumber = 30
    """Deadline of one HTTP request."""
    max_batch: Count = 32
    """Samples per request."""
    max_concurrent: Count = 8
    """Concurrent requests of a replica, divided among the addresses (at least one each)."""
    max_response_bytes: Annotated[int, Field(ge=64)] = 4 * 1024 * 1024
    """Largest answer to one request, unpacked; a longer one is not read to its end and has failed."""
    headers: Headers | None = None
    """HTTP headers; `${VARIABLE}` in one is read from the driver's environment and written to no file."""
    num_replicas: Count = 1
    """Serve replicas that send the requests."""

    checks = (_secrets_are_there, _one_authorization)

    def __repr_args__(self) -> Any:
        """Masks secrets: tracebacks and Ray's list of trainers show this text."""
        return masked_tree(dict(super().__repr_args__())).items()


class MathSource(Source):
    type: Literal["math"]
    """Verifiable answers: math-verify compares the response with the answer in the column data.label_key."""
    correct: float = 1.0
    """Reward of a response whose answer equals the label."""
    wrong: float = 0.0
    """Reward of any other response, those without an answer included."""
    timeout_seconds: PositiveNumber = 10
    """Deadline of one comparison; a response that takes longer counts as wrong and in reward/unverified."""
    num_processes: Count = 1
    """Processes per replica that compare; up to 8 more while comparisons take longer than a second."""
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
    """Deadline of one scoring; a response that takes longer gets 0 and counts in reward/unverified."""
    num_processes: Count = 1
    """Processes per replica that score; up to 8 more while scorings take longer than a second."""
    num_replicas: Count = 1
    """Serve replicas of this source."""


class EnvironmentSource(Source):
    type: Literal["environment"]
    """The rewards that rollout.environment gave, added up over an episode."""


RewardSourceConfig = Annotated[
    FunctionSource | ModelSource | RemoteSource | MathSource | ReasoningGymSource | EnvironmentSource,
    Field(discriminator="type"),
]
