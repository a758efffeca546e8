"""Number 24: what a hostile or broken server can do to samples, memory and secrets."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from rayrlhf.config.reward import RemoteSource
from rayrlhf.reward.items import Failure, RewardError, ScoreItem
from rayrlhf.reward.remote import RemoteReward, resolved_source
from tests.samples import make_prompt

Talk = Callable[[socket.socket], None]
TOKEN = "tok-5f3c9a-secret"


class RawServer:
    """Hands each request's bytes to `requests` and its connection to `talk`."""

    def __init__(self, talk: Talk) -> None:
        self.requests: list[bytes] = []
        self.talk = talk
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/score"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(65536)
            head, _, body = asked.partition(b"\r\n\r\n")
            length = next((line for line in head.lower().split(b"\r\n") if b"content-length" in line), b": 0")
            while len(body) < int(length.partition(b":")[2]):
                body += connection.recv(65536)
            self.requests.append(head + b"\r\n\r\n" + body)
            with suppress(OSError):  # the client has left, as it should
                self.talk(connection)


@contextmanager
def serving(talk: Talk) -> Iterator[RawServer]:
    server = RawServer(talk)
    try:
        yield server
    finally:
        server.socket.close()


def response(status: str, headers: dict[str, str] | None = None, body: bytes = b"[1, 1]") -> Talk:
    lines = {"Content-Length": str(len(body)), **(headers or {})}
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return lambda connection: connection.sendall(head.encode() + b"\r\n" + body)


def ask(url: str, **options: Any) -> list[float | Failure]:
    source = RemoteSource.model_validate({"type": "remote", "urls": [url], **options})
    items = [ScoreItem(make_prompt(prompt="p "), response="r", token_ids=[1]) for _ in range(2)]

    async def once() -> list[float | Failure]:
        replica = RemoteReward(source, None, resolved_source(source))
        try:
            return await replica.score(items)
        finally:
            if replica.session is not None:
                await replica.session.close()

    return asyncio.run(once())


def reason(url: str, **options: Any) -> str:
    first, second = ask(url, **options)
    assert isinstance(first, Failure) and first == second
    return first.reason


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
def test_24_a_redirect_takes_neither_headers_nor_samples_to_another_origin(status: str) -> None:
    """Before: all five were followed, with the custom header; 301, 302 and 303 as a GET, whose page was taken
    for the rewards.
    """
    with serving(response("200 OK")) as other:
        target = f"http://127.0.0.1:{other.port}/steal?token={TOKEN}&a=1"
        with serving(response(status, {"Location": target})) as server:
            error = reason(server.url, headers={"X-Judge": "judge-secret-1"})
        assert other.requests == []
        assert f"HTTP status {status[:3]}, a redirect to" in error and "urls" in error
        assert f"127.0.0.1:{other.port}/steal?token=***&a=1" in error and TOKEN not in error


def test_24_a_redirect_to_nowhere_is_an_error_too() -> None:
    with serving(response("304 Not Modified", body=b"")) as server:
        assert "HTTP status 304, a redirect to 'nowhere'" in reason(server.url)


def flood(connection: socket.socket) -> None:
    """10 GB, as fast as they are taken."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
    for _ in range(10_000):
        connection.sendall(b"1, " * 333_333)


def test_24_a_body_of_10_gb_never_lies_in_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(flood) as server:
        error = reason(server.url, timeout_seconds=120, max_response_bytes=1_000_000)
    assert "an answer of more than 1000000 bytes" in error and "max_response_bytes=1000000" in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


def test_24_a_body_that_says_it_is_too_long_is_not_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"
    with serving(lambda connection: (connection.sendall(head), time.sleep(0.5))[1]) as server:
        assert "an answer of 10000000000 bytes" in reason(server.url, timeout_seconds=60)


def bomb(mib: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return b"".join(packer.compress(b" " * (1 << 20)) for _ in range(mib)) + packer.flush()


def test_24_a_gzip_bomb_is_unpacked_up_to_the_limit() -> None:
    packed = bomb(300)
    assert len(packed) < 400_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(response("200 OK", {"Content-Encoding": "gzip"}, packed)) as server:
        error = reason(server.url, timeout_seconds=60)
    assert "more than 4194304 bytes after decompression" in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_packed_answer_is_read(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    body = pack(json.dumps({"rewards": [0.25, -1]}).encode())
    with serving(response("200 OK", {"Content-Encoding": encoding}, body)) as server:
        assert ask(server.url) == [0.25, -1.0]
        assert b"accept-encoding: identity" in server.requests[0].lower()
    with serving(response("200 OK", {"Content-Encoding": encoding}, body[:-6])) as server:
        assert "is truncated" in reason(server.url)
    with serving(response("200 OK", {"Content-Encoding": encoding}, b"not packed")) as server:
        assert "cannot be decompressed" in reason(server.url)
    with serving(response("200 OK", {"Content-Encoding": "br"}, body)) as server:
        assert "encoded as 'br'" in reason(server.url)


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(600):
        connection.sendall(b" ")
        time.sleep(0.1)


def test_24_a_body_that_comes_byte_by_byte_has_the_deadline_of_the_request() -> None:
    started = time.monotonic()
    with serving(drip) as server:
        assert "no answer within the source's timeout_seconds=0.5" in reason(server.url, timeout_seconds=0.5)
    assert time.monotonic() - started < 30, "60 s would have been the body's"


def test_24_a_charset_that_is_no_text_does_not_matter() -> None:
    """Before: LookupError, and with it every sample of the batch, without a reason."""
    with serving(response("200 OK", {"Content-Type": "application/json; charset=hex"})) as server:
        assert ask(server.url) == [1.0, 1.0]


def test_24_cookies_are_not_kept() -> None:
    with serving(response("200 OK", {"Set-Cookie": "id=1", "Connection": "close"})) as server:
        ask(server.url, max_batch=1, max_concurrent=1)
        assert len(server.requests) == 2 and b"cookie" not in server.requests[1].lower()


def test_24_a_server_that_quotes_our_headers_does_not_have_them_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before: its page, with the key in it, was the reason of the failed samples, and went to every log."""
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    page = f"bad header Authorization: Bearer {TOKEN}, key literal-key-77, \x1b]0;pwned\x07".encode()
    with serving(response("401 Unauthorized", {}, page)) as server:
        error = reason(
            f"{server.url}?api_key=${{JUDGE_TOKEN}}",
            headers={"Authorization": "Bearer ${JUDGE_TOKEN}", "X-Own": "literal-key-77"},
        )
        asked = server.requests[0].decode()
    assert f"/score?api_key={TOKEN} " in asked and f"Authorization: Bearer {TOKEN}\r\n" in asked
    assert TOKEN not in error and "literal-key-77" not in error and "\x1b" not in error and "***" in error
    assert error.startswith(f"http://127.0.0.1:{server.port}/score?api_key=${{JUDGE_TOKEN}}: HTTP status 401")


def test_24_a_dead_address_is_reported_without_its_secrets() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = reason(f"http://user:pa55word@127.0.0.1:{unused.getsockname()[1]}/?signature=abcdef123")
    assert "pa55word" not in error and "abcdef123" not in error and "ClientConnectorError" in error


def test_24_a_variable_with_a_newline_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it fails every request, or adds a header of somebody's choice."""
    monkeypatch.setenv("JUDGE_TOKEN", f"{TOKEN}\r\nX-Other: 1")
    for options in (
        {"headers": {"Authorization": "Bearer ${JUDGE_TOKEN}"}},
        {"urls": ["http://h/${JUDGE_TOKEN}"]},
    ):
        source = RemoteSource.model_validate({"type": "remote", "urls": ["http://h/"], **options})
        with pytest.raises(RewardError, match=r"what JUDGE_TOKEN holds has the character '\\r'") as refused:
            resolved_source(source)
        assert TOKEN not in str(refused.value)
