"""Rewards from a server of the user's, over HTTP.

The request is POST {"query": [prompt and response as one text, …], "prompts": […], "labels": […]}. The answer
is {"rewards": [one number per query]}, as OpenRLHF's servers give it, or the plain list.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray import serve

from rayrlhf.config.reward import RemoteSource
from rayrlhf.reward.batching import Batcher
from rayrlhf.reward.items import Failure, RewardError, ScoreItem, checked_reward

FROM_ENVIRONMENT = "env:"
SHOWN_CHARACTERS = 200  # of an answer that is wrong
CONNECT_SECONDS = 5  # for the driver's check

Rewards = list[float | Failure]


class RemoteReward:
    """The Serve replica that asks the server. Waiting is all it does, so it has no slot."""

    def __init__(self, source: RemoteSource, label_key: str | None, headers: Mapping[str, str]) -> None:
        self.source = source
        self.label_key = label_key
        self.headers = dict(headers)
        self.session: aiohttp.ClientSession | None = None
        # Every address has its share, so that one that hangs does not hold the others up.
        share = max(1, source.max_concurrent // len(source.urls))
        self.batchers = [
            Batcher[ScoreItem, float | Failure](
                partial(self._ask, url), max_batch=source.max_batch, max_concurrent=share
            )
            for url in source.urls
        ]

    async def score(self, items: list[ScoreItem]) -> Rewards:
        """A retry has the next turn, and with it the next address."""
        answers = await asyncio.gather(
            *(self.batchers[item.turn % len(self.batchers)].ask([item]) for item in items)
        )
        return [reward for [reward] in answers]

    async def _ask(self, url: str, items: Sequence[ScoreItem]) -> Rewards:
        """The border to a server that is not ours: what goes wrong fails these samples, with the reason."""
        if self.session is None:  # needs the running loop
            self.session = aiohttp.ClientSession(
                headers=self.headers, timeout=aiohttp.ClientTimeout(total=self.source.timeout_seconds)
            )
        try:
            async with self.session.post(url, json=request_body(items, self.label_key)) as response:
                text = await response.text(errors="replace")
                status = response.status
        except TimeoutError:
            problem = f"no answer within the source's timeout_seconds={self.source.timeout_seconds:g}"
            return [Failure(f"{url}: {problem}")] * len(items)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return [Failure(f"{url}: {type(error).__name__}: {error}")] * len(items)
        if status >= 300:
            return [Failure(f"{url}: HTTP status {status}: {_shown(text)}")] * len(items)
        rewards = read_rewards(text, len(items))
        return [Failure(f"{url}: {r.reason}") if isinstance(r, Failure) else r for r in rewards]


def request_body(items: Sequence[ScoreItem], label_key: str | None) -> dict[str, list[Any]]:
    return {
        "query": [item.prompt.prompt + item.response for item in items],
        "prompts": [item.prompt.prompt for item in items],
        "labels": [item.prompt.columns.get(label_key) if label_key else None for item in items],
    }


def read_rewards(text: str, count: int) -> Rewards:
    """The rewards of `count` samples in a server's answer. A bad one fails its sample; a wrong number of them
    fails all, since it cannot be told whose they are.
    """

    def all_failed(reason: str) -> Rewards:
        return [Failure(reason)] * count

    try:
        answer = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return all_failed(f"the answer is not JSON: {_shown(text)}")
    values = answer.get("rewards") if isinstance(answer, dict) else answer
    if not isinstance(values, list):
        return all_failed(f'the answer is {_shown(text)}; wanted {{"rewards": [a number per query]}}')
    if len(values) != count:
        return all_failed(f"{len(values)} rewards for {count} queries")
    return [checked_reward(_unpacked(value)) for value in values]


def _unpacked(value: Any) -> Any:
    """What a tensor of shape [count, 1] becomes as JSON is a number in a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…")


def resolve_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """The headers with `env:NAME` replaced by what the environment holds. Raises `RewardError`."""
    resolved: dict[str, str] = {}
    for name, value in (headers or {}).items():
        if value.startswith(FROM_ENVIRONMENT):
            variable = value.removeprefix(FROM_ENVIRONMENT)
            if variable not in os.environ:
                raise RewardError(
                    f"headers.{name}={value}: the environment has no variable {variable}; "
                    "set it where the run is started"
                )
            value = os.environ[variable]
        resolved[name] = value
    return resolved


def check_reachable(url: str) -> None:
    """That something listens there. No request is sent: scoring may be slow. Raises `RewardError`."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RewardError(
            f"urls: nothing answers at {url} ({error}); start the server first, or correct the address"
        ) from error


def remote_deployment(source: RemoteSource, *, label_key: str | None) -> Any:
    """Raises `RewardError` for a header that names an unset variable."""
    deployment = serve.deployment(RemoteReward).options(
        name="reward",
        num_replicas=source.num_replicas,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(source, label_key, resolve_headers(source.headers))
