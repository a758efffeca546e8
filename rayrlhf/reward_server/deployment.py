"""Reward server: a Serve application that implements the protocol of `rayrlhf.reward.remote` over HTTP.

The front replicas listen, parse requests and enforce limits; they import neither torch nor transformers.
Behind them are the scoring deployments, one per source: that of a reward model tokenises texts and batches
those of concurrent requests (see `rayrlhf.reward_server.text_model`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rayrlhf.config.serve_reward import ServedFunction, ServedModel, ServerConfig
from rayrlhf.placement.reaper import HEAD_NODE
from rayrlhf.placement.serve_status import failed_starts
from rayrlhf.placement.slots import Slots
from rayrlhf.reward.functions import function_deployment, hosted_function
from rayrlhf.reward.items import Failure, checked_reward, last_message
from rayrlhf.reward_server.admission import (
    Admission,
    NoToken,
    Overloaded,
    TooSlow,
    check_content,
    check_token,
)
from rayrlhf.reward_server.http_guard import RETRY_AFTER_SECONDS, HttpServer, problem
from rayrlhf.reward_server.requests import (
    LABEL,
    BadRequest,
    ModelFacts,
    Queries,
    cut_to_readable,
    read_queries,
)
from rayrlhf.reward_server.text_model import text_model_deployment
from rayrlhf.usercode import UserCode

HEALTH_SECONDS = 5.0  # timeout of the health check of all sources
SHOWN_CHARACTERS = 300  # of a source's error message

Result = TypeVar("Result")


@dataclass(frozen=True)
class Served:
    """A source, as resolved by the driver."""

    name: str
    source: ServedModel | ServedFunction
    facts: ModelFacts | None = None  # if it is a model
    code: UserCode | None = None  # if it is a function


class SourceFailed(RuntimeError):
    """A source raised, or is restarting; the message names it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # 500 if the same request would fail again, else 503


class RewardServer:
    """Serve replica that listens for HTTP requests itself, without Serve's proxy."""

    async def __init__(
        self, sources: list[Served], handles: list[Any], config: ServerConfig, token: bytes | None
    ) -> None:
        self.config = config
        self.token = token
        self.sources = [
            _Source(served, handle, config) for served, handle in zip(sources, handles, strict=True)
        ]
        self.admission = Admission(config)
        # Python parses one body at a time anyway; a malicious body's memory is then allocated only once.
        self.parsing = asyncio.Semaphore(1)
        self.health: asyncio.Task[Response] | None = None
        self.http = HttpServer(application(self), config)
        await self.http.start()

    async def check_health(self) -> None:
        self.http.check()

    async def check_token(self, request: Request) -> None:
        check_token(request, self.token)

    async def answer(self, request: Request) -> Response:
        """Answer an authorised request before its deadline; pending work is cancelled when it ends."""
        seconds = self.config.timeout_seconds
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                check_content(request)
                with self.admission.request():
                    body = await self.admission.body(request)
                    rewards = await _unless_gone(request, self._rewards(body))
            if loop.time() > deadline:  # both were due in the same iteration of a busy event loop
                raise TimeoutError
            return JSONResponse({"rewards": rewards})
        except TimeoutError:
            limit = {"server.timeout_seconds": seconds}
            return _problem(504, "no rewards in time; send fewer queries per request, or retry later", limit)

    async def _rewards(self, body: bytes) -> list[float | None]:
        """The weighted sums, null where a source could not score. If a source rejects the request, the work
        of the others is cancelled.
        """
        async with self.parsing:
            queries = await asyncio.to_thread(read_queries, body, max_queries=self.config.max_queries)
        del body
        per_source = [source.arguments(queries) for source in self.sources]
        pairs = zip(self.sources, per_source, strict=True)
        tasks = [asyncio.ensure_future(source.score(items)) for source, items in pairs]
        try:
            scores = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [_sum(of_query) for of_query in zip(*scores, strict=True)]

    async def answer_health(self) -> Response:
        """One check of the sources answers all concurrent requests: /health is public and polled often."""
        if self.health is None or self.health.done():
            self.health = asyncio.ensure_future(self._look())
        return await asyncio.shield(self.health)

    async def _look(self) -> Response:
        try:
            await asyncio.wait_for(
                asyncio.gather(*(source.check() for source in self.sources)), HEALTH_SECONDS
            )
        except (TimeoutError, SourceFailed) as error:
            return _problem(503, str(error) or f"a source has not responded for {HEALTH_SECONDS:g} s")
        return JSONResponse({"status": "ok", "sources": [source.served.name for source in self.sources]})


def application(server: RewardServer) -> FastAPI:
    """FastAPI application: the routes, with all errors as JSON."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    route = server.config.route

    for path in (route, f"{route}/"):

        @app.post(path, dependencies=[Depends(server.check_token)])
        async def rewards(request: Request) -> Response:
            return await server.answer(request)

    @app.get(f"{route}/health")
    async def health() -> Response:
        return await server.answer_health()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        requested = f"{request.method} {request.url.path[:100]}"
        return _problem(
            error.status_code, f"{requested}: {error.detail}; POST to {route}", headers=error.headers
        )

    @app.exception_handler(NoToken)
    async def no_token(_: Request, error: NoToken) -> Response:
        return _problem(401, str(error), headers={"WWW-Authenticate": "Bearer"})

    @app.exception_handler(BadRequest)
    async def bad_request(_: Request, error: BadRequest) -> Response:
        return _problem(error.status, str(error), error.limit)

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        return _problem(503, str(error), error.limit)

    @app.exception_handler(TooSlow)
    async def too_slow(_: Request, error: TooSlow) -> Response:
        return _problem(408, str(error), {"server.read_timeout_seconds": server.config.read_timeout_seconds})

    @app.exception_handler(SourceFailed)
    async def source_failed(_: Request, error: SourceFailed) -> Response:
        return _problem(error.status, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client has disconnected

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return _problem(500, "internal error; see the server's log")  # uvicorn logs the traceback

    return app


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client disconnects, cancels it and raises `ClientDisconnect`."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has disconnected; call it after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Source:
    """A source and the handle of its deployment."""

    def __init__(self, served: Served, handle: Any, config: ServerConfig) -> None:
        self.served = served
        self.handle = handle
        self.config = config

    def arguments(self, queries: Queries) -> list[Any]:
        """The items for its deployment. Raises `BadRequest`."""
        if self.served.facts is None:
            return queries.items
        assert isinstance(self.served.source, ServedModel)
        most = self.config.max_request_tokens
        return cut_to_readable(queries.query, self.served.source, self.served.facts, most)

    async def score(self, items: list[Any]) -> list[float | None]:
        """Weighted scores. Raises `SourceFailed`, and `BadRequest` if the deployment rejects the request."""
        if not items:
            return []
        found = await self._ask("score_together" if self.served.facts is None else "score_texts", items)
        if isinstance(found, BadRequest):
            raise found
        scores = [checked_reward(score) for score in found]
        return [None if isinstance(score, Failure) else self._weighted(score) for score in scores]

    def _weighted(self, score: float) -> float | None:
        if self.served.facts is not None:
            score = (score - self.served.facts.mean) / self.served.facts.std
        score *= self.served.source.weight
        return score if math.isfinite(score) else None

    async def check(self) -> None:
        """Raises `SourceFailed` if the model actor of a replica is dead."""
        if self.served.facts is not None:
            await self._ask("check_health")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        response = getattr(self.handle, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:  # may come from user code
            reason = ascii(last_message(error))[1:-1]
            raise SourceFailed(f"{self.served.name}: {reason[:SHOWN_CHARACTERS]}", status=500) from error
        except (RayActorError, DeploymentUnavailableError, RequestCancelledError) as error:
            # The process died: Serve starts another one, and the client may retry.
            raise SourceFailed(f"{self.served.name} is restarting; retry", status=503) from error


def _sum(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    total = sum(known)
    return total if len(known) == len(scores) and math.isfinite(total) else None


def _problem(
    status: int,
    message: str,
    limit: Mapping[str, float] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error response that closes the connection: the body of a rejected request may not have been read."""
    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
    return JSONResponse(
        problem(message, limit),
        status_code=status,
        headers={**(headers or {}), **retry, "Connection": "close"},
    )


def server_app(sources: list[Served], config: ServerConfig, slots: Slots | None, token: bytes | None) -> Any:
    """The Serve application. `slots` has a role `reward:<index>` for every model; `token` is a digest."""
    deployment = serve.deployment(RewardServer).options(
        name="server",
        num_replicas=config.num_replicas,
        max_ongoing_requests=64,  # Serve's own requests only: clients connect by HTTP
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},  # the server's address is there
        health_check_period_s=5,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(config.num_replicas),
    )
    handles = [_scorer(served, index, slots, config) for index, served in enumerate(sources)]
    return deployment.bind(sources, handles, config, token)


def _scorer(served: Served, index: int, slots: Slots | None, config: ServerConfig) -> Any:
    if isinstance(served.source, ServedModel):
        assert slots is not None and served.facts is not None
        return text_model_deployment(
            served.source,
            served.facts,
            role=f"reward:{index}",
            max_request_tokens=config.max_request_tokens,
            slots=slots,
        )
    assert served.code is not None
    assert isinstance(served.source, ServedFunction)
    return function_deployment(
        hosted_function(served.code, served.source, config.timeout_seconds),
        label_key=LABEL,
        num_replicas=served.source.num_replicas,
        name=served.name,
        say=print,  # to Ray's log of the replica
    )
