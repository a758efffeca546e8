"""Rewards over HTTP, against a real server of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rayrlhf.config.reward import RemoteSource
from rayrlhf.reward.items import Failure, RewardError, ScoreItem
from rayrlhf.reward.remote import RemoteReward, check_reachable, read_rewards, resolved_source
from tests.samples import make_prompt

Answer = Callable[[dict[str, list[Any]]], tuple[int, str]]  # request -> status and text of the response


class Server:
    """Answers each POST by `answer`; keeps the requests and how many it worked on at once."""

    def __init__(self) -> None:
        self.requests: list[dict[str, list[Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = lambda asked: (200, json.dumps({"rewards": [len(q) for q in asked["query"]]}))
        self.under_way = self.most_under_way = 0
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(asked)
                    server.headers.append(dict(self.headers))
                    server.under_way += 1
                    server.most_under_way = max(server.most_under_way, server.under_way)
                status, text = server.answer(asked)
                with lock:
                    server.under_way -= 1
                with suppress(ConnectionError):  # of a client that has given up
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def items(count: int = 2, *, attempt: int = 0) -> list[ScoreItem]:
    return [
        ScoreItem(make_prompt(prompt=f"p{i} ", answer=i), response="r" * i, token_ids=[1], attempt=attempt)
        for i in range(count)
    ]


def remote(urls: list[str], **options: Any) -> RemoteSource:
    return RemoteSource.model_validate({"type": "remote", "urls": urls, **options})


def ask(urls: list[str], *requests: list[ScoreItem], **options: Any) -> list[list[float | Failure]]:
    """All requests at once, to one replica."""
    source = remote(urls, **options)

    async def everything() -> list[list[float | Failure]]:
        replica = RemoteReward(source, "answer", resolved_source(source))
        try:
            return list(await asyncio.gather(*map(replica.score, requests)))
        finally:
            if replica.session is not None:
                await replica.session.close()

    return asyncio.run(everything())


def reasons(url: str, **options: Any) -> set[str]:
    [rewards] = ask([url], items(), **options)
    assert all(isinstance(reward, Failure) for reward in rewards)
    return {reward.reason for reward in rewards if isinstance(reward, Failure)}


def test_the_request_and_its_answer(server: Server) -> None:
    assert ask([server.url], items(3)) == [[3.0, 4.0, 5.0]]  # "p0 " + "", "p1 " + "r", "p2 " + "rr"
    assert server.requests == [
        {"query": ["p0 ", "p1 r", "p2 rr"], "prompts": ["p0 ", "p1 ", "p2 "], "labels": [0, 1, 2]}
    ]


def test_single_samples_reach_the_server_in_batches(server: Server) -> None:
    rewards = ask([server.url], *([item] for item in items(40)), max_batch=16, max_concurrent=4)
    assert rewards == [[float(len(f"p{i} ") + i)] for i in range(40)]
    assert sorted((len(asked["query"]) for asked in server.requests), reverse=True) == [16, 16, 8]


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    def slowly(asked: dict[str, list[Any]]) -> tuple[int, str]:
        time.sleep(0.05)
        return 200, json.dumps([1.0] * len(asked["query"]))

    server.answer = slowly
    ask([server.url], *([item] for item in items(12)), max_batch=1, max_concurrent=3)
    assert len(server.requests) == 12 and server.most_under_way <= 3


def test_addresses_take_turns(server: Server) -> None:
    other = Server()
    try:
        ask([server.url, other.url], items(2, attempt=0), items(1, attempt=1), items(1, attempt=2))
        assert sum(len(asked["query"]) for asked in server.requests) == 3
        assert sum(len(asked["query"]) for asked in other.requests) == 1
    finally:
        other.http.shutdown()
        other.http.server_close()


def test_headers_may_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    ask([server.url], items(), headers={"Authorization": "env:JUDGE_KEY", "X-Run": "7"})
    assert server.headers[0]["Authorization"] == "s3cret" and server.headers[0]["X-Run"] == "7"
    unset = remote([server.url], headers={"A": "env:NO_SUCH"})
    with pytest.raises(RewardError, match=r"headers\.A=env:NO_SUCH: the environment has no variable NO_SUCH"):
        resolved_source(unset)


def test_a_slow_server(server: Server) -> None:
    def slowly(_: dict[str, list[Any]]) -> tuple[int, str]:
        time.sleep(5)
        return 200, "[1, 1]"

    server.answer = slowly
    started = time.monotonic()
    assert reasons(server.url, timeout_seconds=0.1) == {
        f"{server.url}: no answer within the source's timeout_seconds=0.1"
    }
    assert time.monotonic() - started < 4.5


def test_an_error_of_the_server_is_reported_with_its_text(server: Server) -> None:
    server.answer = lambda _: (500, "out of\n  memory")
    assert reasons(server.url) == {f"{server.url}: HTTP status 500: 'out of memory'"}


def test_no_server_at_all() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        [reason] = reasons(url)
        assert reason.startswith(f"{url}: ClientConnectorError: ")
        with pytest.raises(RewardError, match=f"urls: cannot connect to {url} .*start the server"):
            check_reachable(url)


def test_a_server_that_listens_is_reachable(server: Server) -> None:
    check_reachable(server.url)
    assert server.requests == [], "no request is sent"


@pytest.mark.parametrize(
    "text",
    ["[1, 2.5]", '{"rewards": [1, 2.5]}', '{"rewards": [[1], [2.5]], "scores": [0, 0], "extra_logs": {}}'],
)
def test_forms_of_a_good_answer(text: str) -> None:
    assert read_rewards(text, 2) == [1.0, 2.5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<html>hello</html>", "the answer is not JSON: '<html>hello</html>'"),
        ("", "the answer is not JSON: ''"),
        ('{"reward": [1, 2]}', 'the answer is \'{"reward": [1, 2]}\'; wanted {"rewards": '),
        ("3.5", "the answer is '3.5'; wanted"),
        ('{"rewards": [1]}', "1 rewards for 2 queries"),
        ("[1, 2, 3]", "3 rewards for 2 queries"),
        ("[" * 100_000, "the answer is not JSON: '[[["),
        ("[1, 1" + "0" * 5000 + "]", "the answer is not JSON: '[1, 10"),
    ],
)
def test_what_fails_every_sample_of_the_request(text: str, reason: str) -> None:
    first, second = read_rewards(text, 2)
    assert isinstance(first, Failure) and first == second
    assert first.reason.startswith(reason) and len(first.reason) < 400


@pytest.mark.parametrize(
    "bad",
    ["NaN", "null", '"1.0"', "Infinity", "1e400", "true", "1" + "0" * 4000, "1e99", "[1, 2]", "{}", "[]"],
)
def test_what_fails_its_own_sample_only(bad: str) -> None:
    good, failed = read_rewards(f'{{"rewards": [0.5, {bad}]}}', 2)
    assert good == 0.5
    assert isinstance(failed, Failure) and failed.reason.startswith("returned ")
