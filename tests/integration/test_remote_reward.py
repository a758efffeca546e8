"""Rewards from elsewhere, in real runs: a server that fails in every way, and verifiable answers."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.policy.driver import run_policy
from rayrlhf.reward.graders import import_reasoning_gym
from tests.integration.policy_runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

TIMEOUT_SECONDS = 1.0
FAULTS = ("slow", "status 500", "garbage", "too few", "NaN")
BAD_ATTEMPTS_PER_FAULT = 5  # samples; a request of several may make it a few more
PROMPTS_PER_STEP, NUM_STEPS = 16, 4  # each of the 64 prompts once: a query's text names its sample


class FailingServer:
    """First slow, then broken in four other ways, then fine; knows which sample got a reward."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()  # by query
        self.rewarded: set[str] = set()
        self.bad: Counter[str] = Counter()  # samples by fault
        self.batches: list[int] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
                with lock:
                    fault = server.note(queries)
                if fault == "slow":
                    time.sleep(3 * TIMEOUT_SECONDS)
                status, text = answer(fault, len(queries))
                with suppress(ConnectionError):  # of a client that has given up
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def note(self, queries: list[str]) -> str | None:
        self.attempts.update(queries)
        self.batches.append(len(queries))
        for fault in FAULTS:
            if self.bad[fault] < BAD_ATTEMPTS_PER_FAULT:
                self.bad[fault] += len(queries)
                return fault
        self.rewarded |= set(queries)
        return None


def answer(fault: str | None, count: int) -> tuple[int, str]:
    if fault == "status 500":
        return 500, "out of memory"
    if fault == "garbage":
        return 200, "<html>please log in</html>"
    if fault == "too few":
        return 200, json.dumps({"rewards": [1.0] * (count - 1)})
    if fault == "NaN":
        return 200, json.dumps({"rewards": [float("nan")] * count})
    return 200, json.dumps({"rewards": [0.5] * count})


@pytest.fixture
def server() -> Iterator[FailingServer]:
    made = FailingServer()
    yield made
    made.http.shutdown()
    made.http.server_close()


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "tiny" / name).read_text().splitlines()]


@pytest.mark.long
def test_every_sample_that_a_server_loses_is_counted(
    tmp_path: Path, tiny_model: str, server: FailingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{server.http.server_port}"
    source = {
        "type": "remote",
        "name": "judge",
        "urls": [f"{address}/a", f"{address}/b"],
        "timeout_seconds": TIMEOUT_SECONDS,
        "max_batch": 3,
    }
    config = tiny_run(
        tmp_path,
        tiny_model,
        critic=None,
        algorithm={"advantage": "reinforce_pp", "kl_coef": 0.0},
        rollout={"prompts_per_step": PROMPTS_PER_STEP},
        reward={"sources": [source], "retries": 1, "max_failed_fraction": 1.0},
        train={"num_steps": NUM_STEPS},
    )
    assert run_policy(config) == 0

    # 25 bad answers or a few more fall on the 16 samples of the first step, each of which is asked twice: at
    # least 9 had two of them, and not all.
    lost = set(server.attempts) - server.rewarded
    assert all(server.bad[fault] >= BAD_ATTEMPTS_PER_FAULT for fault in FAULTS)
    assert len(server.attempts) == PROMPTS_PER_STEP * NUM_STEPS and 9 <= len(lost) < PROMPTS_PER_STEP
    assert all(server.attempts[query] == 2 for query in lost), "retried before it was given up"
    steps = [line for line in lines_of(tmp_path, "metrics.jsonl") if "reward/failed" in line]
    assert sum(line["reward/failed"] for line in steps) == len(lost)
    assert sum(line["data/samples"] for line in steps) == len(server.rewarded), (
        "only samples with a reward are trained on"
    )
    assert [line["reward/source/judge"] for line in steps] == [0.5] * NUM_STEPS
    # A lost sample has a name: its row is kept.
    unscored = [row for row in lines_of(tmp_path, "rollouts.jsonl") if row["reward"] is None]
    assert len(unscored) == len(lost)
    assert f"reward source judge: {len(lost)} samples failed: {address}/" in "".join(capsys.readouterr())


@pytest.mark.long
def test_verifiable_answers_alongside_a_function(tmp_path: Path, tiny_model: str) -> None:
    """math-verify and reasoning-gym in real replicas, on rows with nested columns."""
    made = import_reasoning_gym().create_dataset("chain_sum", size=16, seed=1, max_terms=2, max_digits=1)
    rows = tmp_path / "sums.jsonl"
    rows.write_text("".join(json.dumps({"prompt": row["question"][-40:], **row}) + "\n" for row in made))
    config = tiny_run(
        tmp_path,
        tiny_model,
        critic=None,
        data={"train": str(rows), "label_key": "answer", "max_prompt_tokens": 128},
        algorithm={"advantage": "grpo", "kl_coef": 0.0},
        rollout={"prompts_per_step": 8, "group_size": 2},
        reward={
            "sources": [
                {"type": "math", "name": "math", "wrong": -1.0},
                {"type": "reasoning_gym", "name": "gym", "answer": "last_line"},
                {
                    "type": "function",
                    "name": "vowels",
                    "function": "tests.integration.policy_runs:share_of_vowels",
                    "normalize": True,
                },
            ],
        },
        train={"num_steps": 2},
    )
    assert run_policy(config) == 0
    steps = [line for line in lines_of(tmp_path, "metrics.jsonl") if "reward/failed" in line]
    assert len(steps) == 2 and all(line["reward/failed"] == 0 for line in steps)
    for line in steps:
        assert -1.0 <= line["reward/source/math"] <= 1.0
        assert 0.0 <= line["reward/source/gym"] <= 1.0
        assert 0.0 <= line["reward/source/vowels"] <= 1.0


@pytest.mark.long
def test_24_a_run_leaves_its_secrets_nowhere_and_is_resumed(
    tmp_path: Path,
    tiny_model: str,
    server: FailingServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Literal ones and one of the environment, in files and in what is printed; config.yaml has `***`, which
    hinders no resume.
    """
    secrets = ("from-env-secret-1", "header-secret-2", "query-secret-3", "user-secret-4")
    monkeypatch.setenv("JUDGE_TOKEN", secrets[0])
    for fault in FAULTS:
        server.bad[fault] = BAD_ATTEMPTS_PER_FAULT
    address = f"127.0.0.1:{server.http.server_port}/score?token={secrets[2]}"
    source = {
        "type": "remote",
        "name": "judge",
        "urls": [f"http://me:{secrets[3]}@{address}", f"http://127.0.0.1:9/?api_key={secrets[2]}"],
        "headers": {"X-Judge": "Bearer ${JUDGE_TOKEN}", "X-Own": secrets[1]},
    }

    def run(urls: list[str], num_steps: int) -> tuple[int, str]:
        config = tiny_run(
            tmp_path,
            tiny_model,
            critic=None,
            algorithm={"advantage": "reinforce_pp", "kl_coef": 0.0},
            reward={"sources": [source | {"urls": urls}], "retries": 1, "max_failed_fraction": 1.0},
            train={"num_steps": num_steps},
        )
        return run_policy(config), "".join(capfd.readouterr())

    code, output = run(source["urls"], 1)
    assert code == 2 and "cannot connect to http://127.0.0.1:9/?api_key=***" in output
    for num_steps in (1, 2):
        code, more = run(source["urls"][:1], num_steps)
        assert code == 0
        output += more
    assert not any(secret in output for secret in secrets)
    run_path = tmp_path / "runs" / "tiny"
    for path in run_path.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert "Bearer ${JUDGE_TOKEN}" in (run_path / "config.yaml").read_text()
    steps = [line["step"] for line in lines_of(tmp_path, "metrics.jsonl") if "reward/failed" in line]
    assert steps == [1, 2]
