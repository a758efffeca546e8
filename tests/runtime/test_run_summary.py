"""What a run came to, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runtime.results import RunResult
from rayrlhf.runtime.run_summary import write_summary


def evaluation(mean: float, rows: list[tuple[Any, str, float]]) -> dict[str, Any]:
    return {
        "metrics": {
            "eval/reward_mean": mean,
            "eval/reward_ci_low": mean - 0.1,
            "eval/reward_ci_high": mean + 0.2,
            "eval/response_tokens_mean": 9.0,
        },
        "rows": [
            {"prompt": prompt, "response": response, "reward": reward} for prompt, response, reward in rows
        ],
    }


def result(before: dict[str, Any], after: dict[str, Any]) -> RunResult:
    return RunResult(
        before=before,
        after=after,
        best={"step": 2, "reward": 0.8},
        steps=4,
        seconds_total=61.26,
        seconds_per_phase={"rollout": 30.04, "update_actor": 20.0},
        export="runs/x/export",
    )


def written(result: RunResult, run_path: Path, num_samples: int = 5) -> dict[str, Any]:
    write_summary(result, run_path, num_samples=num_samples)
    return json.loads((run_path / "summary.json").read_text(encoding="utf-8"))


def test_a_summary_by_hand(tmp_path: Path) -> None:
    before = evaluation(0.5, [("é", "dull", 0.4), ("q", "sad", 0.6)])
    after = evaluation(0.75, [("é", "bright", 0.7), ("q", "glad", 0.8)])
    assert written(result(before, after), tmp_path) == {
        "reward_before": 0.5,
        "reward_before_ci": [0.4, 0.7],
        "reward_after": 0.75,
        "reward_after_ci": [0.65, 0.95],
        "best": {"step": 2, "reward": 0.8},
        "steps": 4,
        "seconds_total": 61.3,
        "seconds_per_phase": {"rollout": 30.0, "update_actor": 20.0},
        "export": "runs/x/export",
        "samples": [
            {"prompt": "é", "before": "dull", "after": "bright", "reward_before": 0.4, "reward_after": 0.7},
            {"prompt": "q", "before": "sad", "after": "glad", "reward_before": 0.6, "reward_after": 0.8},
        ],
    }
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert "é" in text and text.endswith("}\n"), "readable by people"


def test_without_held_out_prompts(tmp_path: Path) -> None:
    summary = written(result({}, {}), tmp_path)
    assert summary["reward_before"] is summary["reward_after"] is None
    assert summary["reward_before_ci"] is summary["reward_after_ci"] is None
    assert summary["samples"] == []


@pytest.mark.parametrize(
    "num_prompts, num_samples, shown",
    [
        (12, 5, [0, 2, 4, 6, 8]),
        (10, 5, [0, 2, 4, 6, 8]),
        (4, 5, [0, 1, 2, 3]),
        (100, 2, [0, 50]),
        (3, 0, []),
    ],
)
def test_samples_are_spread_over_the_prompts(
    num_prompts: int, num_samples: int, shown: list[int], tmp_path: Path
) -> None:
    rows = [(f"p{i}", "r", 0.0) for i in range(num_prompts)]
    summary = written(result(evaluation(0, rows), evaluation(1, rows)), tmp_path, num_samples)
    assert [sample["prompt"] for sample in summary["samples"]] == [f"p{i}" for i in shown]


def test_only_prompts_that_were_scored_both_times_are_paired(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    before = evaluation(0, [("only before", "a", 0.0), (conversation, "b", 0.1)])
    after = evaluation(1, [(conversation, "c", 0.9), ("only after", "d", 1.0)])
    [sample] = written(result(before, after), tmp_path)["samples"]
    assert sample["prompt"] == conversation and (sample["before"], sample["after"]) == ("b", "c")
