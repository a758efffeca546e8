"""Writes a run's `summary.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayrlhf.runtime.results import RunResult


def write_summary(result: RunResult, run_path: Path, *, num_samples: int) -> None:
    """Write the summary of a policy run. Rewards are None without evaluation prompts."""
    before, after = result.before, result.after
    summary = {
        **_reward("before", before),
        **_reward("after", after),
        "best": result.best or None,
        **_spent(result),
        "samples": _pairs(before.get("rows", []), after.get("rows", []), num_samples),
    }
    _write(summary, run_path)


def write_supervised_summary(result: RunResult, config: Any, run_path: Path) -> None:
    """Write the summary of a supervised job: every metric before and after training."""
    summary = {
        "job": config.job,
        "evaluation": {"before": result.before.get("metrics"), "after": result.after.get("metrics")},
        "best": result.best or None,
        **_spent(result),
    }
    _write(summary, run_path)


def _spent(result: RunResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "seconds_total": round(result.seconds_total, 1),
        "seconds_per_phase": {name: round(spent, 1) for name, spent in result.seconds_per_phase.items()},
        "export": result.export,
    }


def _write(summary: dict[str, Any], run_path: Path) -> None:
    (run_path / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _reward(when: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    metrics = evaluation.get("metrics")
    if not metrics:
        return {f"reward_{when}": None, f"reward_{when}_ci": None}
    return {
        f"reward_{when}": metrics["eval/reward_mean"],
        f"reward_{when}_ci": [metrics["eval/reward_ci_low"], metrics["eval/reward_ci_high"]],
    }


def _pairs(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Responses to the same prompts before and after training, spread evenly over the held-out set."""
    later = {json.dumps(row["prompt"]): row for row in after}
    both = [(row, later[json.dumps(row["prompt"])]) for row in before if json.dumps(row["prompt"]) in later]
    step = max(1, len(both) // max(1, count))
    return [
        {
            "prompt": first["prompt"],
            "before": first["response"],
            "after": second["response"],
            "reward_before": first["reward"],
            "reward_after": second["reward"],
        }
        for first, second in both[::step][:count]
    ]
