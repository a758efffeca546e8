"""Config of jobs/serve_reward.py, a reward server over HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, PositiveNumber, Problem, Section, Wanted
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.reward_sources import FunctionLimits, FunctionName, ModelSource, SourceName

Route = Annotated[
    str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)+$"), Wanted("a path such as /get_reward, without a final /")
]
TokenPlace = Annotated[
    str,
    Field(pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:\S.*)$"),
    Wanted("env:NAME or file:PATH: the token itself must not be in the config"),
]


class ServedModel(ModelSource):
    """A reward model that tokenises each query as it is: no chat template is applied, and special tokens in
    the text are parsed as such. The score is read at the last token. Reward models are usually trained to
    score at the end-of-sequence token, and rayrlhf's own `type: remote` sends responses without special
    tokens: then set `append_eos`.
    """

    type: Literal["model"]
    """A reward model; it scores each query as it is, at its last token, without a chat template."""
    name: SourceName | None = None
    """Name in the server's messages; reward0, reward1, … when left out."""
    normalize: bool = False
    """Subtract the `mean` and divide by the `std` that the checkpoint's config.json carries."""
    append_eos: bool = False
    """Add the eos token to queries that lack it at their end; with read_at: answer_end they get their own."""
    max_tokens: Count | None = None
    """Tokens of the longest query; what the model's positions allow when left out."""
    on_long: Literal["reject", "keep_end", "keep_start"] = "reject"
    """What happens to a longer query: answer 413, or score its last or first max_tokens tokens."""


class ServedFunction(FunctionLimits):
    type: Literal["function"]
    """Your Python function: f(prompts, responses, labels) -> one number per response."""
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
    """Reward sources; a query's reward is the weighted sum of theirs."""

    @property
    def source_names(self) -> list[str]:
        """One per source: its name in messages."""
        return [source.name or f"reward{index}" for index, source in enumerate(self.sources)]


def _every_request_has_a_connection(server: ServerConfig) -> Problem | None:
    if server.max_connections >= server.max_requests:
        return None
    return Problem(
        "max_connections",
        f"{server.max_connections}, with max_requests={server.max_requests}",
        "a connection for each request that is held",
        "raise max_connections, or lower max_requests",
    )


class ServerConfig(Section):
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that it listens on; 0.0.0.0 accepts other machines: then set `token`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port that it listens on, at the head node."""
    route: Route = "/get_reward"
    """Path of the POST requests; GET <route>/health returns the server's health, without a token."""
    token: TokenPlace | None = None
    """Bearer token of its clients, read at the start from `env:NAME` or `file:PATH`; none when left out."""
    num_replicas: Count = 1
    """Serve replicas that read requests; they share the port. The limits below are each replica's."""
    timeout_seconds: PositiveNumber = 60
    """Deadline of one request, from its headers on, time in the queue included; then the answer is 504."""
    read_timeout_seconds: PositiveNumber = 20
    """Time for a request's headers to arrive, and again for its body; slower clients are cut off (408)."""
    max_body_bytes: Count = 8 * 2**20
    """Bytes of the largest body; larger ones are refused (413) before they are read."""
    max_queries: Count = 1024
    """Queries of one request; more are refused (413) before any is tokenised."""
    max_request_tokens: Count = 1_000_000
    """Tokens of all queries of one request; more are refused (413)."""
    max_requests: Count = 256
    """Requests held at once; those past them are refused at once (503, with Retry-After)."""
    max_connections: Count = 1024
    """Connections held at once; beyond them idle ones are closed, and if all are busy new ones get 503."""
    start_timeout_seconds: PositiveNumber = 600
    """Deadline for the server to start."""

    checks = (_every_request_has_a_connection,)


class ServeRewardConfig(Section):
    job: Literal["serve_reward"] = "serve_reward"
    """A reward server: POST {"query": […], "prompts": […], "labels": […]} -> {"rewards": […]}."""
    server: ServerConfig = ServerConfig()
    """Address, limits and access of the server."""
    reward: ServedRewardConfig
    """What scores a query."""
    placement: PlacementConfig = PlacementConfig()
    """Which roles share slots."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how the job is launched; only `rayrlhf render` reads it."""
