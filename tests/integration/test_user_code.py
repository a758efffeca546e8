"""23: a reward of the user's that does its worst, behind a real Serve replica."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.inference.driver import run_generate
from tests.integration.answer_runs import lines_of, tiny_generation

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

REWARD = """
import os, time
import helper

print("\\n".join(f"line {i}" for i in range(1000)))

def score(responses):
    for response in responses:
        exec(response if len(response) < 40 else "pass")  # that of the trial is longer
    return [helper.VALUE for _ in responses]
"""


def scored(tmp_path: Path, model: str, responses: list[str], **reward: Any) -> int:
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "helper.py").write_text("VALUE = 0.5")
    rows = [{"prompt": f"say {i}", "answer": response} for i, response in enumerate(responses)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "function", "function": f"{tmp_path}/reward.py:score", "name": "mine"}
    return run_generate(
        tiny_generation(
            tmp_path,
            model,
            data={
                "train": str(tmp_path / "given.jsonl"),
                "response_key": "answer",
                "max_prompt_tokens": 64,
            },
            reward={"sources": [{**source, "timeout_seconds": 5}], "retries": 0, **reward},
        )
    )


@pytest.mark.long
def test_the_others_are_scored_in_the_meantime(
    tmp_path: Path, tiny_model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Six hanging calls silenced a replica, and `exit()` ended a run with code 0."""
    bad = ["os._exit(0)", "exit()", *["time.sleep(1000)"] * 6]
    responses = [bad[i // 3] if i % 3 == 0 else "pass" for i in range(24)]
    assert scored(tmp_path, tiny_model, responses, max_failed_fraction=0.9) == 0
    rows = lines_of(tmp_path / "runs/tiny/generations.jsonl")
    scores = {row["prompt"]: row["score"] for row in rows}
    assert [scores[f"say {i}"] for i in range(24)] == [None, 0.5, 0.5] * 8
    out = capfd.readouterr().out
    assert "mine: line 0" in out and "mine: line 4" in out and "mine: line 5" not in out
    log = tmp_path / "runs/tiny/logs/reward-mine.log"
    assert f"mine: … 995 more lines in {log}" in out.replace("\n", " ")
    assert log.read_text().startswith("line 0\nline 1\n")


def test_a_run_in_which_nothing_can_be_scored_says_why(
    tmp_path: Path, tiny_model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert scored(tmp_path, tiny_model, ["os._exit(0)"] * 8) == 1
    error = capfd.readouterr().err
    assert "8 of 8 samples could not be scored" in error
    assert f"mine: {tmp_path}/reward.py:score: it ended its own process with exit code 0" in error
    assert "Traceback" not in error
