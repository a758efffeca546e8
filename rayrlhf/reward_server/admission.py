"""Admission control of the reward server: authorisation, request size and number of concurrent requests."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.requests import Request

from rayrlhf.config.serve_reward import ServerConfig
from rayrlhf.reward_server.requests import BadRequest

# All bodies held at once may have as many bytes as this many bodies of the largest size.
BODIES_HELD = 16
BEARER = "bearer "
JSON = "application/json"


class NoToken(Exception):
    """A request without the server's token."""


class Overloaded(Exception):
    """More requests than the server holds at once."""

    def __init__(self, message: str, limit: Mapping[str, float]) -> None:
        super().__init__(message)
        self.limit = dict(limit)


class TooSlow(Exception):
    """The body did not arrive in time."""


def token_digest(token: str) -> bytes:
    """Digest of a token for the replicas: they can verify the token but not use it."""
    return hashlib.sha256(token.encode()).digest()


def check_token(request: Request, digest: bytes | None) -> None:
    """Constant-time comparison. Raises `NoToken`."""
    if digest is None:
        return
    given = request.headers.get("authorization", "")
    token = given[len(BEARER) :].strip() if given[: len(BEARER)].lower() == BEARER else ""
    if not hmac.compare_digest(token_digest(token), digest):
        raise NoToken("wanted the header 'Authorization: Bearer …' with this server's token (server.token)")


def check_content(request: Request) -> None:
    """Raises `BadRequest` (415) for a body that is not declared as JSON, or is compressed."""
    found = request.headers.get("content-type", "")
    if found.partition(";")[0].strip().lower() != JSON:
        raise BadRequest(f"Content-Type is {ascii(found)[:100]}; wanted {JSON}", status=415)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise BadRequest(f"Content-Encoding is {ascii(encoding)[:100]}; wanted a plain body", status=415)


class Admission:
    """Counts the requests in flight and the bytes of their bodies."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.num_requests = 0
        self.num_bytes = 0
        self.max_bytes = BODIES_HELD * config.max_body_bytes

    @contextmanager
    def request(self) -> Iterator[None]:
        """Raises `Overloaded` immediately if the limit of requests is reached."""
        most = self.config.max_requests
        if self.num_requests >= most:
            raise Overloaded(f"{most} requests are in progress already", {"server.max_requests": most})
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    async def body(self, request: Request) -> bytes:
        """Raises `BadRequest` (413) as soon as it is known to be too large, `TooSlow`, `Overloaded` if the
        bodies of other requests use up the memory limit, and `ClientDisconnect`.
        """
        most = self.config.max_body_bytes
        declared = request.headers.get("content-length", "0")
        if len(declared) > 18 or int(declared) > most:
            raise self._too_large(f"{declared} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.read_timeout_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self.num_bytes += len(chunk)
                    if len(body) > most:
                        raise self._too_large(f"more than {most} bytes")
                    if self.num_bytes > self.max_bytes:
                        limit = {"bytes of all bodies": self.max_bytes}
                        raise Overloaded("the bodies of other requests use up the memory limit", limit)
        except TimeoutError as error:
            raise TooSlow(f"only {len(body)} bytes of the body arrived in time") from error
        finally:
            self.num_bytes -= len(body)
        return bytes(body)

    def _too_large(self, found: str) -> BadRequest:
        most = self.config.max_body_bytes
        return BadRequest(
            f"the body has {found}; this server accepts at most {most}: send fewer queries per request",
            status=413,
            limit={"server.max_body_bytes": most},
        )
