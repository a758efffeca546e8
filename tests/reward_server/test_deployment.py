"""The reward server's front under what clients may do to it, over real sockets.

The deployments behind it are played by the test, so that it is known what they were asked;
tests/integration/test_serve_reward.py has the real ones.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import psutil
import pytest
from ray.exceptions import RayActorError

from rayrlhf.reward_server import http_guard
from tests.reward_server.running_server import front, head, lengths, post, query_body, read_answer

WAIT_SECONDS = 60  # on a machine that is busy with other things
MIB = 2**20
GOOD = query_body(["abc"])
WANTED = {"rewards": [3.0]}
TOKEN = "0123456789abcdef"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, WAIT_SECONDS))


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / MIB


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def answered_for_ever(texts: list[str]) -> Any:
    await asyncio.Event().wait()


# ---- what is too large


def test_a_body_of_400_mb_is_refused_before_it_is_sent_and_memory_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_guard, "LINGER_SECONDS", 2.0)

    async def work() -> None:
        async with front() as (_, port, handle, _):
            assert (await post(port, GOOD))[2] == WANTED
            before = resident_mib()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(400 * 10**6))
            status, headers, answer = await read_answer(reader)
            assert status == 413 and headers["connection"] == "close"
            assert (
                answer["limit"] == {"server.max_body_bytes": 8 * MIB} and "400000000 bytes" in answer["error"]
            )
            # A client that sends on all the same: what it sends is read without heed, until it is cut off.
            with pytest.raises(ConnectionError):
                for _ in range(400):
                    writer.write(b"a" * 10**6)
                    await writer.drain()
                    assert resident_mib() < before + 60
                await asyncio.sleep(3)
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.1)
                writer.write(b"a")
                await writer.drain()
            started = time.monotonic()
            assert (await post(port, GOOD))[2] == WANTED
            assert time.monotonic() - started < 5
            assert resident_mib() < before + 60 and len(handle.asked) == 2

    run(work())


def test_a_body_without_a_length_is_refused_where_it_passes_the_limit() -> None:
    async def work() -> None:
        async with front(max_body_bytes=MIB) as (_, port, handle, server):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(None, {"Transfer-Encoding": "chunked"}))
            chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
            for _ in range(17):  # and no last one
                writer.write(chunk)
            status, _, answer = await read_answer(reader)
            assert status == 413 and answer["limit"] == {"server.max_body_bytes": MIB}
            writer.close()
            assert server.admission.num_bytes == 0 and handle.asked == []
            assert (await post(port, GOOD))[2] == WANTED

    run(work())


def test_200_000_queries_are_refused_before_any_is_tokenised() -> None:
    async def work() -> None:
        async with front() as (_, port, handle, _):
            started = time.monotonic()
            status, _, answer = await post(port, query_body(["a"] * 200_000))
            assert status == 413 and answer["limit"] == {"server.max_queries": 1024}
            assert "'query' has 200000 items" in answer["error"] and handle.asked == []
            assert (await post(port, GOOD))[2] == WANTED
            assert time.monotonic() - started < 10

    run(work())


def test_texts_that_cannot_be_read_are_refused_by_their_length_before_they_are_tokenised() -> None:
    """The model reads 64 tokens of 16 characters or fewer: 1,024 characters may fit, one more cannot."""

    async def work() -> None:
        async with front(max_request_tokens=128) as (_, port, handle, _):
            assert (await post(port, query_body(["a" * 1024])))[0] == 200
            status, _, answer = await post(port, query_body(["b", "a" * 1025]))
            assert status == 413 and answer["error"].startswith(
                "query 1 has 1025 characters, 65 tokens or more"
            )
            assert answer["limit"] == {"max_tokens": 64}
            status, _, answer = await post(port, query_body(["a" * 1024, "b" * 1024, "c"]))
            assert status == 413 and answer["limit"] == {"server.max_request_tokens": 128}
            assert "129 tokens or more" in answer["error"] and len(handle.asked) == 1

    run(work())


def test_bodies_held_at_once_have_a_limit_of_their_own() -> None:
    async def work() -> None:
        async with front(max_body_bytes=65536, read_timeout_seconds=30) as (_, port, _, server):
            kept = []
            for _ in range(16):  # all but a byte of each
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head(65536) + b"a" * 65535)
                kept.append(writer)
            await until(lambda: server.admission.num_bytes == 16 * 65535)
            status, headers, answer = await post(port, b'"' + b"a" * 100 + b'"')
            assert status == 503 and headers["retry-after"] == "1" and "memory" in answer["error"]
            for writer in kept:
                writer.close()
            await until(lambda: server.admission.num_requests == 0)
            assert (await post(port, GOOD))[2] == WANTED and server.admission.num_bytes == 0

    run(work())


# ---- too many, too slow, gone


async def at_once(count: int, *, seconds: float, limit: int) -> None:
    async def slow(texts: list[str]) -> list[float]:
        await asyncio.sleep(0.3 * seconds)
        return await lengths(texts)

    taken: list[tuple[int, float]] = []

    async def one(port: int) -> None:
        started = time.monotonic()
        status, headers, answer = await post(port, GOOD)
        taken.append((status, time.monotonic() - started))
        assert answer == WANTED if status == 200 else set(answer) == {"error", "limit"}
        assert status != 503 or headers["retry-after"] == "1"

    async with front(slow, max_requests=limit, timeout_seconds=seconds) as (_, port, _, server):
        results = await asyncio.gather(*(one(port) for _ in range(count)), return_exceptions=True)
        assert [result for result in results if result is not None] == []
        found = Counter(status for status, _ in taken)
        assert set(found) == {200, 503} and found[200] >= limit and found[503] > count // 2, found
        # Client and server share a process here: its own time for so many sockets is part of it.
        assert max(wait for _, wait in taken) < seconds + 5, max(taken)
        assert sorted(wait for status, wait in taken if status == 503)[found[503] // 2] < seconds
        await until(lambda: server.admission.num_requests == 0)
        assert (await post(port, GOOD))[2] == WANTED


def test_500_requests_at_once_those_past_the_queue_get_503_at_once() -> None:
    run(at_once(500, seconds=5, limit=32))


@pytest.mark.long
def test_3_000_requests_at_once_those_past_the_queue_get_503_at_once() -> None:
    run(at_once(3_000, seconds=10, limit=256))


def test_no_request_is_answered_after_its_deadline_and_its_work_ends() -> None:
    async def work() -> None:
        async with front(answered_for_ever, timeout_seconds=0.3) as (_, port, handle, server):
            started = time.monotonic()
            status, _, answer = await post(port, GOOD)
            assert status == 504 and answer["limit"] == {"server.timeout_seconds": 0.3}
            assert 0.3 <= time.monotonic() - started < 5
            await until(lambda: handle.cancelled == 1 and server.admission.num_requests == 0)

    run(work())


def test_the_work_of_a_caller_who_has_gone_is_cancelled() -> None:
    async def work() -> None:
        async with front(answered_for_ever) as (_, port, handle, server):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(len(GOOD)) + GOOD)
            await until(lambda: len(handle.asked) == 1)
            assert handle.cancelled == 0 and server.admission.num_requests == 1
            writer.close()
            await until(lambda: handle.cancelled == 1 and server.admission.num_requests == 0)

    run(work())


@pytest.mark.parametrize("said", [b"", b"POST /get_reward HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_slow_client_is_cut_off_in_its_headers(said: bytes) -> None:
    """However steadily it sends on. One that has said nothing gets no answer either."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        while said:
            writer.write(b"a")
            await asyncio.sleep(0.05)

    async def work() -> None:
        async with front(read_timeout_seconds=0.5) as (_, port, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            sending = asyncio.ensure_future(drip(writer))
            started = time.monotonic()
            if said:
                status, headers, answer = await read_answer(reader)
                assert status == 408 and headers["connection"] == "close"
                assert answer["limit"] == {"server.read_timeout_seconds": 0.5}
            assert await reader.read() == b"" and 0.5 <= time.monotonic() - started < 10
            sending.cancel()
            writer.close()

    run(work())


def test_a_slow_client_is_cut_off_in_its_body() -> None:
    async def work() -> None:
        async with front(read_timeout_seconds=0.5) as (_, port, _, server):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(100) + b"{")
            status, headers, answer = await read_answer(reader)
            assert (
                status == 408
                and headers["connection"] == "close"
                and "1 bytes of the body" in answer["error"]
            )
            assert await reader.read() == b""
            assert server.admission.num_requests == 0
            writer.close()

    run(work())


def test_connections_have_a_limit_and_idle_ones_give_way() -> None:
    async def work() -> None:
        limits: dict[str, Any] = {"max_connections": 2, "max_requests": 2}
        async with front(answered_for_ever, **limits) as (_, port, handle, _):
            kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for _, writer in kept:
                writer.write(head(len(GOOD)) + GOOD)
            await until(lambda: len(handle.asked) == 2)
            status, headers, answer = await post(port, GOOD)
            assert status == 503 and headers["retry-after"] == "1"
            assert answer["limit"] == {"server.max_connections": 2}
            for _, writer in kept:
                writer.close()
        async with front(**limits) as (_, port, _, _):
            kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for reader, writer in kept:
                writer.write(head(len(GOOD)) + GOOD)
                assert (await read_answer(reader))[2] == WANTED
            assert (await post(port, GOOD))[2] == WANTED
            first, second = kept
            assert await first[0].read() == b"", "the one that was idle for longer has been closed"
            second[1].write(head(len(GOOD)) + GOOD)
            assert (await read_answer(second[0]))[2] == WANTED
            for _ in range(5):  # nor do those count that were refused and do not hang up
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head(10**9))
                assert (await read_answer(reader))[0] == 413
                kept.append((reader, writer))
            assert (await post(port, GOOD))[2] == WANTED
            for _, writer in kept:
                writer.close()

    run(work())


def test_replicas_share_a_port_and_other_programs_do_not() -> None:
    with http_guard.listening_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with http_guard.listening_socket("127.0.0.1", port) as second:
            second.listen()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"server\.port={port}: cannot listen there"):
            http_guard.listening_socket("127.0.0.1", port)


# ---- who may ask, and how


def test_a_bearer_token_is_asked_for_before_anything_is_read() -> None:
    async def work() -> None:
        async with front(token=TOKEN) as (_, port, handle, _):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head(1000, given))  # and no body
                status, headers, answer = await read_answer(reader)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert "server.token" in answer["error"] and TOKEN not in answer["error"]
                writer.close()
            assert handle.asked == []
            for given in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
                assert (await post(port, GOOD, {"Authorization": given}))[2] == WANTED
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /get_reward/health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await read_answer(reader))[2] == {"status": "ok", "sources": ["rm"]}
            writer.close()

    run(work())


HOSTILE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"' + b"a" * 10**6 + b'"',
    b"[" * 10**6,
    b'{"a":' * 10**5,
    b'{"query": ["a"], "labels": ' + b"[" * 900 + b"]" * 901,
    b'{"query": ["a"], "labels": [' + b"9" * 10**6 + b"]}",
    b'{"query": ["a"], "labels": [1e999]}',
    b'{"query": ["a"], "labels": [NaN]}',
    b'{"query": ["a"], "labels": [-Infinity]}',
    b'{"query": ["a"], "query": ["b"]}',
    b'{"query": ["a"], "labels": [{"x": 1, "x": 2}]}',
    b'{"query": ["\xff\xfe"]}',
    '{"query": ["a"]}'.encode("utf-16"),
    '{"query": ["a"]}'.encode("utf-8-sig"),
    b'{"query": ["\\ud800"]}',
    b'{"query": ["a\\udc00b"]}',
    b'{"query": ["a\x00b"]}',
    b'{"query": ["a"], "prompts": ["\\udfff"]}',
    b'{"query": [["a"]]}',
    b'{"query": {"0": "a"}}',
    b'{"query": [null]}',
    b'{"query": ["a"], "labels": "a"}',
    b'{"query": ["a"]} {"query": ["b"]}',
]


@pytest.mark.parametrize("body", HOSTILE, ids=[repr(body[:40]) for body in HOSTILE])
def test_hostile_json_is_answered_by_400_in_one_line(body: bytes) -> None:
    async def work() -> None:
        async with front() as (_, port, handle, _):
            status, _, answer = await post(port, body)
            assert status == 400 and set(answer) == {"error"} and handle.asked == []
            assert len(answer["error"]) < 400 and answer["error"].isprintable()
            assert "Traceback" not in answer["error"] and "File " not in answer["error"]

    run(work())


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, "x-www-form-urlencoded"),
        ({"Content-Type": "text/plain"}, "text/plain"),
        ({"Content-Type": ""}, "''"),
        ({"Content-Encoding": "gzip"}, "gzip"),
    ],
)
def test_what_is_not_sent_as_json_is_refused(headers: dict[str, str], named: str) -> None:
    """A web page can make its reader's browser send the first three to another machine, but not JSON."""

    async def work() -> None:
        async with front() as (_, port, handle, _):
            status, _, answer = await post(port, GOOD, headers)
            assert status == 415 and named in answer["error"] and handle.asked == []
            assert (await post(port, GOOD, {"Content-Type": "application/json; charset=utf-8"}))[0] == 200

    run(work())


@pytest.mark.parametrize(
    ("said", "status", "named"),
    [
        (b"nonsense\r\n\r\n", 400, "Invalid HTTP request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10**5, 400, "Invalid HTTP request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404, "Not Found; POST to /get_reward"),
        (b"GET /get_reward HTTP/1.1\r\nHost: x\r\n\r\n", 405, "Method Not Allowed; POST to /get_reward"),
        (b"POST /get_reward/health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405, "Not Allowed"),
        (head(None, {"Content-Length": "-1"}), 400, "Invalid HTTP request"),
        (head(None, {"Content-Length": "9" * 18}), 413, "9" * 18),
        (head(None, {"Transfer-Encoding": "chunked"}) + b"zz\r\n", 400, "Invalid HTTP request"),
    ],
)
def test_errors_of_http_are_json_too(said: bytes, status: int, named: str) -> None:
    async def work() -> None:
        async with front() as (_, port, _, server):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            found, headers, answer = await read_answer(reader)
            assert (found, headers["content-type"]) == (status, "application/json") and named in answer[
                "error"
            ]
            assert await reader.read() == b"", "the connection ends"
            await until(lambda: server.admission.num_requests == 0)
            writer.close()

    run(work())


def test_a_connection_is_kept_for_good_requests_and_answers_keep_their_order() -> None:
    async def work() -> None:
        async with front() as (_, port, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for texts in (["a"], ["ab", "abc"], []):  # all at once: pipelined
                body = json.dumps({"query": texts}).encode()
                writer.write(head(len(body)) + body)
            found = [(await read_answer(reader))[2] for _ in range(3)]
            assert found == [{"rewards": [1.0]}, {"rewards": [2.0, 3.0]}, {"rewards": []}]
            writer.close()

    run(work())


def test_a_source_that_restarts_is_503_and_what_fails_unexpectedly_says_nothing() -> None:
    async def dies(texts: list[str]) -> Any:
        raise RayActorError

    async def fails(texts: list[str]) -> Any:
        raise ValueError("a secret of this server")

    async def work() -> None:
        async with front(dies) as (_, port, _, _):
            status, headers, answer = await post(port, GOOD)
            assert (status, answer["error"]) == (503, "rm is restarting; retry")
            assert headers["retry-after"] == "1"
        async with front(fails) as (_, port, _, _):
            status, _, answer = await post(port, GOOD)
            assert status == 500 and "secret" not in str(answer)

    run(work())


def test_health_looks_at_the_sources_once_for_all_who_ask() -> None:
    asked = 0

    async def look(texts: list[str]) -> list[float]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.5)
        return []

    async def one(port: int) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /get_reward/health HTTP/1.1\r\nHost: x\r\n\r\n")
        status, _, _ = await read_answer(reader)
        writer.close()
        return status

    async def work() -> None:
        async with front(look) as (_, port, _, _):
            assert await asyncio.gather(*(one(port) for _ in range(20))) == [200] * 20
            assert asked < 20

    run(work())
