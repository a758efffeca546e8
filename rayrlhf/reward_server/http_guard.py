"""HTTP server of the reward server's replicas: uvicorn with additional limits.

uvicorn waits forever for a request's headers, accepts any number of connections, and closes a connection
while its client is still sending, which makes the client's system drop the answer. Ray Serve's own proxy is
that uvicorn; it reads bodies of any size into memory while a replica handles the request, and a client can
disable its deadlines by a header. Therefore replicas listen themselves, without Serve's proxy.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rayrlhf.config.serve_reward import ServerConfig

LINGER_SECONDS = 5.0  # for a client to read the last answer of its connection
IDLE_SECONDS = 75  # between two requests of a connection; most clients close it earlier
MAX_HEAD_BYTES = 16 * 1024  # of the request line and headers
BACKLOG = 2048  # pending connections held by the operating system
RETRY_AFTER_SECONDS = 1
START_SECONDS = 30.0
REASONS = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


class HttpServer:
    """Serves an ASGI application at an address, in the running event loop."""

    def __init__(self, app: Any, config: ServerConfig) -> None:
        self.config = config
        # uvicorn warns at each malformed request; errors of the application are still logged.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=cast(Any, partial(GuardedProtocol, config)),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                backlog=BACKLOG,
            )
        )
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once it listens. Raises `OSError` if the address cannot be bound."""
        listener = listening_socket(self.config.host, self.config.port)
        self.task = asyncio.ensure_future(self.server.serve(sockets=[listener]))
        async with asyncio.timeout(START_SECONDS):
            while not self.server.started:
                self.check()
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.server.should_exit = True
        if self.task is not None:
            await self.task

    def check(self) -> None:
        """Raise if it has ended."""
        if self.task is None or self.task.done():
            reason = None if self.task is None or self.task.cancelled() else self.task.exception()
            raise RuntimeError(
                f"the HTTP server at {self.config.host}:{self.config.port} has ended"
            ) from reason


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket that several replicas share: the operating system distributes the connections."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"server.host={host}, server.port={port}: cannot listen there: {error}") from error
    return listener


class GuardedProtocol(H11Protocol):
    """One connection. It is closed if its headers are late; the number of connections is limited."""

    def __init__(self, limits: ServerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.limits = limits
        self.head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        lingering = LingeringTransport(cast(asyncio.Transport, transport), self.loop)
        self.transport = cast(asyncio.Transport, lingering)
        if len(self.connections) >= self.limits.max_connections and not self._make_room():
            limit = {"server.max_connections": self.limits.max_connections}
            self._answer(503, "too many connections", limit)
            return
        super().connection_made(self.transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        cast(LingeringTransport, self.transport).lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # the data is no longer needed
            return
        super().data_received(data)
        if self._answering():
            self._stop_head_timer()
        elif self.head_timer is None and not self.transport.is_closing():
            self._start_head_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._answering() and self.conn.trailing_data[0]:
            self._start_head_timer()

    def send_400_response(self, msg: str) -> None:
        if self._answering():  # the body of a request in progress is malformed
            self._give_up_request()
        self._answer(400, msg)

    @property
    def is_idle(self) -> bool:
        """Between two requests."""
        return self.timeout_keep_alive_task is not None and not self._answering()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _give_up_request(self) -> None:
        """Make the application see a disconnected client, so that it sends no answer."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self.head_timer = self.loop.call_later(self.limits.read_timeout_seconds, self._too_slow)

    def _stop_head_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _too_slow(self) -> None:
        self.head_timer = None
        if self.transport.is_closing():
            return
        if not self.conn.trailing_data[0]:  # no part of a request has arrived
            self.transport.close()
            return
        limit = {"server.read_timeout_seconds": self.limits.read_timeout_seconds}
        self._answer(408, "the headers of the request did not arrive in time", limit)

    def _make_room(self) -> bool:
        """Close a connection whose last answer was sent, else the one that has been idle longest."""
        others = [one for one in self.connections if isinstance(one, GuardedProtocol)]
        ended = [one for one in others if one.transport.is_closing()]
        idle = [one for one in others if one.is_idle]
        if not ended and not idle:
            return False
        unused = ended[0] if ended else min(idle, key=GuardedProtocol.idle_until)
        self.connections.discard(unused)
        unused.transport.abort()
        return True

    def idle_until(self) -> float:
        assert self.timeout_keep_alive_task is not None
        return self.timeout_keep_alive_task.when()

    def _answer(self, status: int, message: str, limit: Mapping[str, float] | None = None) -> None:
        """Send an error as the last answer of this connection, where no request was parsed."""
        self.transport.write(raw_answer(status, message, limit))
        self.transport.close()


class LingeringTransport:
    """A transport whose `close` flushes, then discards input until the client has closed its end too, and
    ends the connection after at most LINGER_SECONDS. If it closed with unread data from the client, the
    client's system would drop the answer and report a broken connection instead.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._end is not None or self._transport.is_closing()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._transport.pause_reading()

    def close(self) -> None:
        if self.is_closing():
            return
        self._end = self._loop.call_later(LINGER_SECONDS, self._transport.abort)
        self._transport.resume_reading()
        self._transport.write_eof()

    def lost(self) -> None:
        if self._end is not None:
            self._end.cancel()


def problem(message: str, limit: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Body of every answer other than 200: the error and, if one was exceeded, the limit."""
    return {"error": message} | ({"limit": dict(limit)} if limit else {})


def raw_answer(status: int, message: str, limit: Mapping[str, float] | None = None) -> bytes:
    body = json.dumps(problem(message, limit)).encode()
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *([f"Retry-After: {RETRY_AFTER_SECONDS}"] if status == 503 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
