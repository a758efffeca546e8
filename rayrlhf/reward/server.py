"""The reward server: a Serve application that speaks the protocol of `rayrlhf.reward.remote` over HTTP.

In front are replicas that read requests and tokenise texts; behind them stand the deployments that score, one
per source, which gather the texts of concurrent requests into batches (see `rayrlhf.reward.model`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from starlette.requests import Request
from starlette.responses import JSONResponse

from rayrlhf.config.serve_reward import ServedFunction, ServedModel, ServerConfig
from rayrlhf.models.load import load_tokenizer
from rayrlhf.placement.apply import Slots
from rayrlhf.reward.functions import function_deployment, hosted_function
from rayrlhf.reward.items import Failure, ScoreItem, checked_reward, last_words
from rayrlhf.reward.model import model_deployment
from rayrlhf.reward.query import LABEL, BadRequest, ModelFacts, Queries, TextTokens, read_queries, token_item
from rayrlhf.usercode import UserCode

HEALTH_SECONDS = 5.0  # for all sources to say that they are well


@dataclass(frozen=True)
class Served:
    """A source as the driver found it."""

    name: str
    source: ServedModel | ServedFunction
    facts: ModelFacts | None = None  # of a model
    code: UserCode | None = None  # of a function


class RewardServer:
    """A Serve replica that answers HTTP requests."""

    def __init__(self, sources: list[Served], handles: list[Any], config: ServerConfig) -> None:
        self.config = config
        self.sources = [_Source(served, handle) for served, handle in zip(sources, handles, strict=True)]

    async def __call__(self, request: Request) -> JSONResponse:
        path = request.url.path.removeprefix(self.config.route)
        if path == "/health" and request.method == "GET":
            return await self._health()
        if path not in ("", "/"):
            return _problem(404, f"no {request.url.path} here; POST to {self.config.route}")
        if request.method != "POST":
            return _problem(405, f"{request.method} is not answered; POST to {self.config.route}")
        body = await request.body()
        try:
            rewards = await asyncio.wait_for(self._rewards(body), self.config.timeout_seconds)
        except BadRequest as error:
            return _problem(error.status, str(error))
        except _SourceFailed as error:
            return _problem(500, str(error))
        except TimeoutError:
            limit = f"server.timeout_seconds={self.config.timeout_seconds:g}"
            return _problem(504, f"no rewards within {limit}; send fewer queries at once")
        return JSONResponse({"rewards": rewards})

    async def _rewards(self, body: bytes) -> list[float | None]:
        """The weighted sums, null where a source could not score. Every source reads the request before any
        of them scores it.
        """
        queries = await asyncio.to_thread(read_queries, body)
        asked = [await asyncio.to_thread(source.items, queries) for source in self.sources]
        pairs = zip(self.sources, asked, strict=True)
        scores = await asyncio.gather(*(source.score(items) for source, items in pairs))
        return [_sum(of_query) for of_query in zip(*scores, strict=True)]

    async def _health(self) -> JSONResponse:
        try:
            await asyncio.wait_for(
                asyncio.gather(*(source.check() for source in self.sources)), HEALTH_SECONDS
            )
        except (TimeoutError, _SourceFailed) as error:
            return _problem(503, str(error) or f"a source is silent for {HEALTH_SECONDS:g} s")
        return JSONResponse({"status": "ok", "sources": [source.served.name for source in self.sources]})


class _SourceFailed(RuntimeError):
    """A source raised, or is restarting; the message names it."""


class _Source:
    """A source with its deployment."""

    def __init__(self, served: Served, handle: Any) -> None:
        self.served = served
        self.handle = handle
        self.tokens: TextTokens | None = None
        if isinstance(served.source, ServedModel):
            assert served.facts is not None
            self.tokens = TextTokens(served.source, load_tokenizer(served.source.path), served.facts)

    def items(self, queries: Queries) -> list[ScoreItem]:
        """Raises `BadRequest`."""
        if self.tokens is None:
            return queries.items
        return [token_item(ids) for ids in self.tokens.of(queries.query)]

    async def score(self, items: list[ScoreItem]) -> list[float | None]:
        """Weighted. Raises `_SourceFailed`."""
        if not items:
            return []
        scores = [checked_reward(score) for score in await self._ask("score", items)]
        return [None if isinstance(score, Failure) else self._weighted(score) for score in scores]

    def _weighted(self, score: float) -> float:
        if self.served.facts is not None:
            score = (score - self.served.facts.mean) / self.served.facts.std
        return self.served.source.weight * score

    async def check(self) -> None:
        """Raises `_SourceFailed` where the model behind a replica is dead."""
        if self.tokens is not None:
            await self._ask("check_health")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.handle, method).remote(*arguments)
        except (RayTaskError, RayActorError) as error:
            # The border to code of the user's and to processes that die: the client may ask again.
            raise _SourceFailed(f"{self.served.name}: {last_words(error)}") from error


def _sum(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) if len(known) == len(scores) else None


def _problem(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


def server_app(sources: list[Served], config: ServerConfig, slots: Slots | None) -> Any:
    """The application; `slots` has a role `reward:<index>` for every model."""
    deployment = serve.deployment(RewardServer).options(
        name="server",
        num_replicas=config.num_replicas,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(
        sources, [_scorer(s, i, slots, config.timeout_seconds) for i, s in enumerate(sources)], config
    )


def _scorer(served: Served, index: int, slots: Slots | None, timeout_seconds: float) -> Any:
    if isinstance(served.source, ServedModel):
        assert slots is not None
        # Reads token ids and no conversation: `policy_path` is whose tokens they are.
        return model_deployment(
            served.source, role=f"reward:{index}", policy_path=served.source.path, prompt_key="", slots=slots
        )
    assert served.code is not None
    assert isinstance(served.source, ServedFunction)
    return function_deployment(
        hosted_function(served.code, served.source, timeout_seconds),
        label_key=LABEL,
        num_replicas=served.source.num_replicas,
        name=served.name,
        say=print,  # into Ray's log of the replica
    )
