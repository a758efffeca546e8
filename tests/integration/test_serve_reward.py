"""The reward server as users start it, asked by our own client, and gone after SIGTERM.

It is a process with a separate Ray: a Ray cluster has one Serve, whose HTTP proxy is settled when it first
starts, and the tests' shared Ray starts it without one.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

from cluster.local.head import free_ports
from rayrlhf.config.reward import RemoteSource
from rayrlhf.reward.items import Failure, ScoreItem
from rayrlhf.reward.remote import RemoteReward, Resolved, check_reachable
from tests.reward_export import MEAN, STD, TEXTS, make_reward_export, plain_scores
from tests.samples import make_prompt

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
GONE_SECONDS = 60
TOKEN = "0123456789abcdef"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
GOOD = json.dumps({"query": ["<s>a"], "prompts": ["<s>"]}).encode()


def response_lengths(responses: list[str], labels: list[Any]) -> list[float | None]:
    """A reward function: labels as they were sent, and null for a response that it cannot judge."""
    judged = zip(responses, labels, strict=True)
    return [None if response == "?" else len(response) + float(label or 0) for response, label in judged]


@contextmanager
def server_of(folder: Path, tree: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The server's process and what it said until it was up."""
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(tree))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["REWARD_TOKEN"] = TOKEN
    process = subprocess.Popen(
        [sys.executable, "jobs/serve_reward.py", str(config)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("curl "):
                break
        yield process, said
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(GONE_SECONDS)


def replicas_of(process: subprocess.Popen[str]) -> dict[psutil.Process, str]:
    """The replicas and the model's actor with their titles, which name the call that they are in, if any."""
    children = psutil.Process(process.pid).children(recursive=True)
    titles = {child: " ".join(child.cmdline()).strip() for child in children}
    return {
        c: title
        for c, title in titles.items()
        if title.startswith(("ray::ServeReplica", "ray::TextScoreActor"))
    }


def resident_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def ask(url: str, items: list[ScoreItem]) -> list[float | Failure]:
    """By the source of a policy run, one request per sample."""

    async def everything() -> list[list[float | Failure]]:
        source = RemoteSource(type="remote", urls=[url])
        replica = RemoteReward(source, "answer", Resolved([url], AUTHORIZATION, values=[TOKEN]))
        try:
            return await asyncio.gather(*(replica.score([item]) for item in items))
        finally:
            if replica.session is not None:
                await replica.session.close()

    return [reward for rewards in asyncio.run(everything()) for reward in rewards]


def post(url: str, body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | AUTHORIZATION)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def sample(text: str, split: int, label: float | None = None) -> ScoreItem:
    return ScoreItem(make_prompt(prompt=text[:split], answer=label), text[split:], token_ids=[])


def test_our_own_client_gets_the_scores_of_plain_transformers(tmp_path: Path) -> None:
    export = make_reward_export(tmp_path)
    [port] = free_ports(1)
    sources = [
        {"type": "model", "path": export, "normalize": True, "max_tokens": 128, "weight": 2.0},
        {"type": "function", "name": "lengths", "weight": 0.5, "function": f"{__name__}:response_lengths"},
    ]
    server = {"port": port, "token": "env:REWARD_TOKEN"}
    with server_of(tmp_path, {"server": server, "reward": {"sources": sources}}) as (process, said):
        url = f"http://127.0.0.1:{port}/get_reward"
        assert said and said[-1].startswith(f"curl -s {url} "), "".join(said)
        assert '-H "Authorization: Bearer $REWARD_TOKEN"' in said[-1] and TOKEN not in "".join(said)
        check_reachable(url)

        items = [sample(text, 4, label) for text, label in zip(TEXTS, (0.0, None, 2.0, 1.0), strict=False)]
        scores = plain_scores(export, TEXTS)
        lengths = [len(text) - 4 + bonus for text, bonus in zip(TEXTS, (0, 0, 2, 1), strict=True)]
        expected = [2.0 * (score - MEAN) / STD + 0.5 * n for score, n in zip(scores, lengths, strict=True)]
        # Many at once: the replica scores them in batches, and each client gets the answer to its request.
        rewards = ask(url, items * 8)
        assert rewards == pytest.approx(expected * 8, abs=1e-5)
        [failure] = ask(url, [sample("<s>a?", 4)])
        assert isinstance(failure, Failure) and "returned None" in failure.reason

        assert post(url, b'{"query": [], "prompts": []}') == (200, {"rewards": []})
        status, problem = post(url, b"{")
        assert status == 400 and "not JSON" in problem
        assert post(url, b'{"query": ["a"]}')[0] == 400
        status, problem = post(url, json.dumps({"query": ["a" * 200], "prompts": ["a"]}).encode())
        assert status == 413 and "201 tokens" in problem and "at most 128" in problem
        status, problem = post(url, json.dumps({"query": ["a"], "prompts": ["a"], "labels": ["x"]}).encode())
        assert status == 500 and problem.startswith("lengths: ")
        assert "response_lengths raised ValueError: could not convert" in problem
        with urllib.request.urlopen(f"{url}/health", timeout=30) as health:
            assert json.loads(health.read()) == {"status": "ok", "sources": ["reward0", "lengths"]}

        survives(process, url)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(GONE_SECONDS) == 0
    _, alive = psutil.wait_procs(started, timeout=GONE_SECONDS)
    assert not alive
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=5)


async def waits_for_ever(labels: list[Any]) -> list[float]:
    """A reward function that says in the file that its label names when it was cancelled."""
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        Path(labels[0]).write_text("cancelled")
        raise
    return [0.0 for _ in labels]


@pytest.mark.long
def test_work_in_a_deployment_ends_with_its_caller_and_at_its_deadline(tmp_path: Path) -> None:
    [port] = free_ports(1)
    source = {"type": "function", "function": f"{__name__}:waits_for_ever"}
    server = {"port": port, "timeout_seconds": 4, "token": "env:REWARD_TOKEN"}
    with server_of(tmp_path, {"server": server, "reward": {"sources": [source]}}) as (_, said):
        url = f"http://127.0.0.1:{port}/get_reward"
        assert said and said[-1].startswith(f"curl -s {url} "), "".join(said)
        gone, late = tmp_path / "gone", tmp_path / "late"
        body = {"query": ["a"], "prompts": ["a"]}
        with pytest.raises(TimeoutError):
            asked = json.dumps(body | {"labels": [str(gone)]}).encode()
            headers = {"Content-Type": "application/json"} | AUTHORIZATION
            urllib.request.urlopen(urllib.request.Request(url, asked, headers), timeout=1.5)
        started = time.monotonic()
        status, problem = post(url, json.dumps(body | {"labels": [str(late)]}).encode())
        assert status == 504 and "no rewards in time" in problem
        assert 4 <= time.monotonic() - started < 10
        deadline = time.monotonic() + 20
        while not (gone.exists() and late.exists()):
            assert time.monotonic() < deadline, "the deployment continues without a client"
            time.sleep(0.1)


def survives(process: subprocess.Popen[str], url: str) -> None:
    """A body of 400 MB, 200,000 queries and a caller without the token; then all is as before."""
    titles = replicas_of(process)
    assert len(titles) == 4, "the front, two sources and the model's actor"
    before = {replica: resident_mib(replica) for replica in titles}
    [front] = [replica for replica, title in titles.items() if "-server:server" in title]
    assert before[front] < 350, "it has imported neither torch nor transformers"
    host, port = urlsplit(url).hostname, urlsplit(url).port
    for sent in (0, 400):  # one that waits for the answer, and one that sends all the same
        client = http.client.HTTPConnection(str(host), port, timeout=30)
        client.putrequest("POST", "/get_reward")
        for name, value in (AUTHORIZATION | {"Content-Type": "application/json"}).items():
            client.putheader(name, value)
        client.putheader("Content-Length", str(400 * 10**6))
        client.endheaders()
        with suppress(ConnectionError):
            for _ in range(sent):
                client.send(b"a" * 10**6)
        if not sent:
            answer = client.getresponse()
            assert answer.status == 413
            assert json.loads(answer.read())["limit"] == {"server.max_body_bytes": 8 * 2**20}
        client.close()
    status, problem = post(url, json.dumps({"query": ["a"] * 200_000, "prompts": ["a"] * 200_000}).encode())
    assert status == 413 and "200000 items; this server accepts at most 1024" in problem
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(url, GOOD, {"Content-Type": "application/json"}))
    started = time.monotonic()
    assert post(url, GOOD)[0] == 200
    assert time.monotonic() - started < 10
    grown = {titles[replica]: resident_mib(replica) - mib for replica, mib in before.items()}
    assert max(grown.values()) < 100, grown


@pytest.mark.long
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    function = {"type": "function", "function": f"{__name__}:response_lengths"}
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        tree = {"server": {"port": port}, "reward": {"sources": [function]}}
        with server_of(tmp_path, tree) as (process, said):
            assert process.wait(GONE_SECONDS) == 2
    output = "".join(said)
    assert f"server.port={port}: another program listens at 127.0.0.1:{port}" in output
    assert "Traceback" not in output
