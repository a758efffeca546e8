"""The reward server's front in this process, over a real socket, with deployments that the test plays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from cluster.local.head import free_ports
from rayrlhf.config.serve_reward import ServedModel, ServerConfig
from rayrlhf.reward_server.admission import token_digest
from rayrlhf.reward_server.deployment import RewardServer, Served
from rayrlhf.reward_server.requests import ModelFacts

JSON = {"Content-Type": "application/json"}
Score = Callable[[list[str]], Awaitable[Any]]


class Handle:
    """A deployment handle whose calls run here. It counts those that were cancelled."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.asked: list[list[str]] = []
        self.cancelled = 0
        self.score_texts = self.check_health = self

    def remote(self, texts: list[str] | None = None) -> Response:
        if texts is not None:
            self.asked.append(texts)
        return Response(self, self.score(texts or []))


class Response:
    def __init__(self, handle: Handle, work: Awaitable[Any]) -> None:
        self.handle = handle
        self.task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self.task.__await__()

    def cancel(self) -> None:
        self.handle.cancelled += 1
        self.task.cancel()


async def lengths(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


@asynccontextmanager
async def front(
    score: Score = lengths, *, token: str | None = None, on_long: Any = "reject", **limits: Any
) -> AsyncIterator[tuple[str, int, Handle, RewardServer]]:
    """Host, port, the handle and the server, with one model of 64 tokens of at most 16 characters each."""
    [port] = free_ports(1)
    config = ServerConfig(port=port, **limits)
    source = ServedModel(type="model", path="rm", on_long=on_long)
    served = Served("rm", source, facts=ModelFacts(64, is_decoder=True, characters_per_token=16))
    handle = Handle(score)
    server = RewardServer.__new__(RewardServer)
    await server.__init__([served], [handle], config, token_digest(token) if token else None)  # pyright: ignore
    try:
        yield config.host, port, handle, server
    finally:
        await server.http.stop()


def query_body(texts: list[str], **more: Any) -> bytes:
    return json.dumps({"query": texts, **more}).encode()


async def post(
    port: int, body: bytes, headers: dict[str, str] | None = None, *, path: str = "/get_reward"
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON. Written out by hand: a client library would hide how a connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(len(body), headers, path=path) + body)
        return await read_answer(reader)
    finally:
        writer.close()


def head(length: int | None, headers: dict[str, str] | None = None, *, path: str = "/get_reward") -> bytes:
    given = (
        JSON
        | {"Host": "x"}
        | (headers or {})
        | ({"Content-Length": str(length)} if length is not None else {})
    )
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers["content-length"]))
    return int(lines[0].split()[1]), headers, json.loads(body)
