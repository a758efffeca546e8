"""Number 34: what a run logs that was killed and resumes from an earlier step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.observe.board import Report
from rayrlhf.observe.sinks import JsonLines
from rayrlhf.observe.step_rows import SUPERSEDED, StepRows


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log_steps(sink: JsonLines, first: int, last: int, attempt: int) -> None:
    for step in range(first, last + 1):
        sink.write(Report("step", step, metrics={"loss": float(attempt)}))
        sink.write(
            Report("rollouts", step, rows=[{"step": step, "response": f"{attempt}.{n}"} for n in "ab"])
        )
        if step % 2 == 0:
            sink.write(Report("eval", step, "during", metrics={"eval/loss": 0.5}, rows=[{"n": attempt}]))


@pytest.mark.parametrize("same_process", [True, False])
def test_34_steps_logged_again_are_in_the_files_once(same_process: bool, tmp_path: Path) -> None:
    """Logged up to 13, resumed from the checkpoint of step 10. Before: 11 to 13 twice in each file."""
    sink = JsonLines(tmp_path)
    log_steps(sink, 1, 13, attempt=1)
    log_steps(sink if same_process else JsonLines(tmp_path), 11, 14, attempt=2)

    metrics = lines(tmp_path / "metrics.jsonl")
    steps = [row for row in metrics if "loss" in row]
    assert [(row["step"], row["loss"]) for row in steps] == [
        *((step, 1.0) for step in range(1, 11)),
        *((step, 2.0) for step in range(11, 15)),
    ]
    assert [row["step"] for row in metrics if "eval/loss" in row] == [2, 4, 6, 8, 10, 12, 14]
    rollouts = [(row["step"], row["response"]) for row in lines(tmp_path / "rollouts.jsonl")]
    assert rollouts == [(s, f"{1 if s < 11 else 2}.{n}") for s in range(1, 15) for n in "ab"]
    # Nothing is lost.
    moved = lines(tmp_path / SUPERSEDED)
    assert [row["step"] for row in moved if row["file"] == "metrics.jsonl"] == [11, 12, 12, 13]
    assert [row["response"] for row in moved if row["file"] == "rollouts.jsonl"] == ["1.a", "1.b"] * 3
    assert lines(tmp_path / "eval" / "during-000012.jsonl") == [{"n": 2}]
    assert lines(tmp_path / "eval" / "superseded" / "during-000012.1.jsonl") == [{"n": 1}]
    assert lines(tmp_path / "eval" / "during-000010.jsonl") == [{"n": 1}]


def test_34_an_evaluation_logged_again_without_a_step(tmp_path: Path) -> None:
    """Killed in the export after the last step: the evaluation after it is all that is repeated."""
    for attempt in (1, 2, 3):
        sink = JsonLines(tmp_path)
        if attempt == 1:
            log_steps(sink, 1, 2, attempt=1)
        sink.write(Report("eval", 2, "after", metrics={"eval/loss": 0.5}, rows=[{"n": attempt}]))
    # The one during step 2 was equal, and stays.
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval/loss": 0.5},
        {"step": 2, "eval/loss": 0.5},
    ]
    assert [row["step"] for row in lines(tmp_path / SUPERSEDED)] == [2, 2]
    assert lines(tmp_path / "eval" / "after-000002.jsonl") == [{"n": 3}]
    folder = tmp_path / "eval" / "superseded"
    assert sorted(path.name for path in folder.iterdir()) == ["after-000002.1.jsonl", "after-000002.2.jsonl"]


@pytest.mark.parametrize("cut", range(1, 40))
def test_34_a_line_that_kill_9_has_cut_is_repaired_or_moved(cut: int, tmp_path: Path) -> None:
    """Before: the next row was written behind the half one, and the file could not be read as JSON lines."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 1.0}\n'
    last = '{"step": 2, "name": "é", "loss": 2.5}\n'.encode()
    path.write_bytes(whole.encode() + last[:-cut])
    JsonLines(tmp_path).write(Report("step", 3, metrics={"loss": 3.0}))
    steps = [row["step"] for row in lines(path)]
    if cut == 1:
        assert steps == [1, 2, 3]
    else:
        assert steps == [1, 3]
        kept = last[:-cut]
        moved = lines(tmp_path / SUPERSEDED) if kept else []
        assert [row["line"] for row in moved] == ([kept.decode(errors="replace")] if kept else [])


def test_a_long_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "response": "' + "x" * 300_000)
    StepRows(path)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text("x" * 300_000)
    StepRows(path)
    assert path.read_text() == ""


def test_lines_that_are_no_rows_move_as_well(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": {"step": 2}\nnull\n{"step": 3}\n')
    rows = StepRows(path)
    assert rows.highest == 3 and rows.take_back(3) == 3
    assert path.read_text() == '{"step": 1}\n'
    assert rows.take_back(2) == 0 and rows.highest == 1


def test_rollouts_are_exact_whatever_they_hold(tmp_path: Path) -> None:
    """A lone surrogate ended the metrics thread before."""
    row = {"step": 1, "response": "\x1b[2J \u202e \ud800 ☀"}
    JsonLines(tmp_path).write(Report("rollouts", 1, rows=[row]))
    assert lines(tmp_path / "rollouts.jsonl") == [row]
