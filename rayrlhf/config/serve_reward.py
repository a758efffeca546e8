"""The tree of jobs/serve_reward.py: a reward server over HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, PositiveNumber, Section, Wanted
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.reward_sources import FunctionLimits, FunctionName, ModelSource, SourceName

Route = Annotated[
    str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)+$"), Wanted("a path such as /get_reward, without a final /")
]


class ServedModel(ModelSource):
    """It reads each query as it stands, with its own tokenizer: no chat template is applied, and special
    tokens in the text are taken as such. What is scored is the last token. Reward models usually learnt to
    judge at the end-of-sequence token, and rayrlhf's own `type: remote` sends responses without special
    tokens: then set `append_eos`.
    """

    type: Literal["model"]
    """A reward model; it scores each query as it stands, at its last token, without a chat template."""
    name: SourceName | None = None
    """Name in the server's messages; reward0, reward1, … when left out."""
    normalize: bool = False
    """Subtract the `mean` and divide by the `std` that the checkpoint's config.json carries."""
    append_eos: bool = False
    """Add the eos token to queries that lack it at their end, as those of rayrlhf's `type: remote` do."""
    max_tokens: Count | None = None
    """Tokens of the longest query; what the model's positions allow when left out."""
    on_long: Literal["reject", "keep_end", "keep_start"] = "reject"
    """What happens to a longer query: answer 413, or score its last or first max_tokens tokens."""


class ServedFunction(FunctionLimits):
    type: Literal["function"]
    """A Python function of yours: f(prompts, responses, labels) -> one number per response."""
    function: FunctionName
    """`module:function` or `path/file.py:function`."""
    weight: float = 1.0
    """Weight in the sum of sources."""
    name: SourceName | None = None
    """Name in the server's messages; reward0, reward1, … when left out."""
    num_replicas: Count = 1
    """Serve replicas of this source."""


class ServedRewardConfig(Section):
    sources: list[Annotated[ServedModel | ServedFunction, Field(discriminator="type")]] = Field(min_length=1)
    """What is served; a query's reward is the weighted sum of theirs."""

    @property
    def source_names(self) -> list[str]:
        """One per source: what it is called in messages."""
        return [source.name or f"reward{index}" for index, source in enumerate(self.sources)]


class ServerConfig(Section):
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that it listens on; 0.0.0.0 lets other machines in, and nobody is asked for a password."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port that it listens on."""
    route: Route = "/get_reward"
    """Path of the POST requests; GET <route>/health tells how the server is."""
    num_replicas: Count = 1
    """Serve replicas that read requests and tokenise them."""
    timeout_seconds: PositiveNumber = 60
    """Deadline of one request, waiting in line included; then the answer is 504."""
    start_timeout_seconds: PositiveNumber = 600
    """Deadline for the server to come up."""


class ServeRewardConfig(Section):
    job: Literal["serve_reward"] = "serve_reward"
    """A reward server: POST {"query": […], "prompts": […], "labels": […]} -> {"rewards": […]}."""
    server: ServerConfig = ServerConfig()
    """Where it listens."""
    reward: ServedRewardConfig
    """What scores a query."""
    placement: PlacementConfig = PlacementConfig()
    """Which model sits where."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how the job is launched; only `rayrlhf render` reads it."""
