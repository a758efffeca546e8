"""Client for rewards from a user's HTTP server.

The request is POST {"query": [prompt and response as one text, …], "prompts": […], "labels": […]}. The answer
is {"rewards": [one number per query]}, as OpenRLHF's servers give it, or the plain list.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDict
from ray import serve

from rayrlhf.config.reward import RemoteSource
from rayrlhf.placement.serve_status import failed_starts
from rayrlhf.reward.batching import Batcher
from rayrlhf.reward.items import Failure, RewardError, ScoreItem, checked_reward
from rayrlhf.secrets import masked, references, remember, remember_all, resolve
from rayrlhf.untrusted_text import one_line

SHOWN_CHARACTERS = 200  # of an invalid answer, in messages
CONNECT_SECONDS = 5  # timeout of the driver's check
CHUNK_BYTES = 64 * 1024

Rewards = list[float | Failure]


class BadAnswer(ValueError):
    """An answer without rewards; the message says why."""


@dataclass(frozen=True)
class Resolved:
    """Addresses and headers with environment variables substituted. Messages show the config's text only."""

    urls: list[str] = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    values: list[str] = field(repr=False)  # of environment variables; secrets, not to be shown in messages


class RemoteReward:
    """Serve replica that queries the server. It only waits for answers, so it needs no slot."""

    def __init__(self, source: RemoteSource, label_key: str | None, resolved: Resolved) -> None:
        self.source = source
        self.label_key = label_key
        self.resolved = resolved
        # This process is not the driver's.
        remember(resolved.values)
        remember_all({"urls": resolved.urls, "headers": resolved.headers})
        self.session: aiohttp.ClientSession | None = None
        # Each address has its own batcher, so that one that hangs does not block the others.
        self.share = max(1, source.max_concurrent // len(source.urls))
        self.batchers = [
            Batcher[ScoreItem, float | Failure](
                partial(self._ask, shown, url), max_batch=source.max_batch, max_concurrent=self.share
            )
            for shown, url in zip(map(masked, source.urls), resolved.urls, strict=True)
        ]

    async def score(self, items: list[ScoreItem]) -> Rewards:
        """A retry has the next attempt number, and therefore uses the next address."""
        answers = await asyncio.gather(
            *(self.batchers[item.attempt % len(self.batchers)].ask([item]) for item in items)
        )
        return [reward for [reward] in answers]

    async def _ask(self, shown: str, url: str, items: Sequence[ScoreItem]) -> Rewards:
        """Query a foreign server: any error fails these samples, with the reason. `shown`: the address as
        shown in messages, without secrets.
        """
        if self.session is None:  # needs the running loop
            self.session = self._make_session()
        try:
            text = await self._post(self.session, url, request_body(items, self.label_key))
        except TimeoutError:
            problem = f"no answer within the source's timeout_seconds={self.source.timeout_seconds:g}"
            return [Failure(f"{shown}: {problem}")] * len(items)
        except BadAnswer as error:
            return [Failure(f"{shown}: {error}")] * len(items)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return [Failure(f"{shown}: {type(error).__name__}: {_foreign(str(error))}")] * len(items)
        rewards = read_rewards(text, len(items))
        return [Failure(f"{shown}: {r.reason}") if isinstance(r, Failure) else r for r in rewards]

    def _make_session(self) -> aiohttp.ClientSession:
        headers = CIMultiDict({"Accept-Encoding": "identity"})
        headers.update(self.resolved.headers)
        return aiohttp.ClientSession(
            headers=headers,
            auto_decompress=False,  # done in `_read`, with a size limit
            # Total time of the request: a server that sends a byte now and then gets no extra time.
            timeout=aiohttp.ClientTimeout(total=self.source.timeout_seconds),
            connector=aiohttp.TCPConnector(limit=self.share * len(self.batchers)),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _post(self, session: aiohttp.ClientSession, url: str, body: dict[str, list[Any]]) -> str:
        """The text of a successful answer. Redirects are errors: following them would send headers and
        samples to an address that is not in the config, and a POST turned into a GET may return anything.

        Raises `BadAnswer`, `TimeoutError` and what aiohttp raises.
        """
        async with session.post(url, json=body, allow_redirects=False) as response:
            try:
                if 300 <= response.status < 400:
                    location = _shown(response.headers.get("Location", "nowhere"))
                    raise BadAnswer(
                        f"HTTP status {response.status}, a redirect to {location}, which is not followed; "
                        "give the address that answers in the source's urls"
                    )
                text = await self._read(response)
                if response.status >= 400:
                    raise BadAnswer(f"HTTP status {response.status}: {_shown(text)}")
                return text
            except BaseException:
                response.close()  # closes the connection too, without waiting for the rest of the answer
                raise

    async def _read(self, response: aiohttp.ClientResponse) -> str:
        """The body, decompressed in chunks; never holds more than the limit. Raises `BadAnswer`."""
        limit = self.source.max_response_bytes
        if (response.content_length or 0) > limit:
            raise BadAnswer(f"an answer of {response.content_length} bytes; {self._wanted}")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise BadAnswer(f"an answer encoded as {_shown(encoding)}; wanted plain, gzip or deflate")
        # 32: gzip and zlib, detected from the header
        unpacker = None if encoding in ("identity", "") else zlib.decompressobj(32 + zlib.MAX_WBITS)
        body = bytearray()
        num_packed = 0
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            num_packed += len(chunk)
            if unpacker is None:
                body += chunk
            else:
                try:
                    body += unpacker.decompress(chunk, limit + 1 - len(body))
                except zlib.error as error:
                    raise BadAnswer(f"an answer that cannot be decompressed ({encoding}): {error}") from error
            if max(len(body), num_packed) > limit:
                packed = " after decompression" if unpacker is not None else ""
                raise BadAnswer(f"an answer of more than {limit} bytes{packed}; {self._wanted}")
        if unpacker is not None and not unpacker.eof:
            raise BadAnswer(f"an answer whose compressed body ({encoding}) is truncated")
        return body.decode("utf-8", errors="replace")

    @property
    def _wanted(self) -> str:
        return f"the limit is the source's max_response_bytes={self.source.max_response_bytes}"


def request_body(items: Sequence[ScoreItem], label_key: str | None) -> dict[str, list[Any]]:
    return {
        "query": [item.prompt.prompt + item.response for item in items],
        "prompts": [item.prompt.prompt for item in items],
        "labels": [item.prompt.columns.get(label_key) if label_key else None for item in items],
    }


def read_rewards(text: str, count: int) -> Rewards:
    """The rewards of `count` samples in a server's answer. An invalid one fails its sample; a wrong number of
    them fails all, since they cannot be assigned to samples.
    """

    def all_failed(reason: str) -> Rewards:
        return [Failure(reason)] * count

    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):  # not JSON; a number with too many digits; nested too deep
        return all_failed(f"the answer is not JSON: {_shown(text)}")
    values = answer.get("rewards") if isinstance(answer, dict) else answer
    if not isinstance(values, list):
        return all_failed(f'the answer is {_shown(text)}; wanted {{"rewards": [a number per query]}}')
    if len(values) != count:
        return all_failed(f"{len(values)} rewards for {count} queries")
    return [checked_reward(_unpacked(value)) for value in values]


def _unpacked(value: Any) -> Any:
    """A tensor of shape [count, 1] becomes a list of one-element lists in JSON. `true` is not a number."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool):
        return Failure(f"returned {json.dumps(value)}, which is not a number")
    return value


def _foreign(text: str) -> str:
    """A server's text, masked and escaped for a message: it may quote our headers."""
    return one_line(masked(text), limit=SHOWN_CHARACTERS)


def _shown(text: str) -> str:
    line = " ".join(masked(text[: 8 * SHOWN_CHARACTERS]).split())
    return repr(line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…")


def resolved_source(source: RemoteSource) -> Resolved:
    """The source's addresses and headers with `${NAME}`, and a header that is `env:NAME`, replaced from the
    environment. Raises `RewardError`.
    """
    headers = source.headers or {}
    return Resolved(
        urls=[_resolved(f"urls.{index}", url, in_url=True) for index, url in enumerate(source.urls)],
        headers={name: _resolved(f"headers.{name}", text) for name, text in headers.items()},
        values=[os.environ[name] for text in (*source.urls, *headers.values()) for name in references(text)],
    )


def _resolved(key: str, text: str, *, in_url: bool = False) -> str:
    try:
        value = resolve(text, in_url=in_url)
    except KeyError as error:
        [name] = error.args
        raise RewardError(
            f"{key}={masked(text)}: the environment has no variable {name}; set it where the run starts"
        ) from None
    refused = [
        character for character in value if not character.isprintable() or (in_url and character == " ")
    ]
    if refused:
        source = f"what {', '.join(references(text)) or 'it'} holds"
        raise RewardError(
            f"{key}: {source} has the character {refused[0]!r}, which is invalid in headers and URLs; "
            "remove a trailing newline if the secret was read from a file"
        )
    return value


def check_reachable(url: str) -> None:
    """Check that the address accepts connections; sends no request, as scoring may be slow. Raises
    `RewardError`.
    """
    address = _resolved("urls", url, in_url=True)
    try:
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RewardError(
            f"urls: cannot connect to {masked(url)} ({_foreign(str(error))}); start the server first, or "
            "correct the address"
        ) from error


def remote_deployment(source: RemoteSource, *, label_key: str | None) -> Any:
    """Raises `RewardError` for a header or a URL that names an unset variable."""
    deployment = serve.deployment(RemoteReward).options(
        name="reward",
        num_replicas=source.num_replicas,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(source.num_replicas),
    )
    return deployment.bind(source, label_key, resolved_source(source))
