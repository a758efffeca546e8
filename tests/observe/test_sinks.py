"""What each sink leaves on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console
from rayrlhf.observe.sinks import JsonLines, Sinks, TensorBoard, Wandb, make_sinks
from tests.samples import make_config

STEP_1 = Report("step", 1, metrics={"reward/mean": 0.5, "loss/actor": -0.25})
STEP_2 = Report("step", 2, metrics={"reward/mean": 0.75, "loss/actor": math.nan})
EVAL = Report(
    "eval",
    2,
    "after",
    metrics={
        "eval/reward_mean": 0.6,
        "eval/reward_ci_low": 0.5,
        "eval/reward_ci_high": 0.7,
        "eval/response_tokens_mean": 12.0,
    },
    rows=[{"prompt": "é", "response": "☀", "reward": 0.6}],
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path)
    for report in (Report("phase", 0, "rollout"), STEP_1, EVAL):
        sink.write(report)
    sink.write(Report("rollouts", 1, rows=[{"step": 1, "reward": None}, {"step": 1, "reward": 0.5}]))
    sink.write(Report("rollouts", 2, rows=[{"step": 2, "reward": 1.0}]))
    sink.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.5, "loss/actor": -0.25},
        {"step": 2, **EVAL.metrics},
    ]
    assert lines(tmp_path / "rollouts.jsonl") == [
        {"step": 1, "reward": None},
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 1.0},
    ]
    assert lines(tmp_path / "eval" / "after-000002.jsonl") == EVAL.rows
    assert "☀" in (tmp_path / "eval" / "after-000002.jsonl").read_text(encoding="utf-8"), "readable by people"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "rollouts.jsonl", "eval"}


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for report in (STEP_1, STEP_2):
        JsonLines(tmp_path).write(report)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_is_undefined_is_null(tmp_path: Path) -> None:
    JsonLines(tmp_path).write(STEP_2)
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 2, "reward/mean": 0.75, "loss/actor": null}\n'


def test_what_json_does_not_know_is_written_as_text(tmp_path: Path) -> None:
    JsonLines(tmp_path).write(Report("rollouts", 1, rows=[{"path": Path("a/b")}]))
    assert lines(tmp_path / "rollouts.jsonl") == [{"path": "a/b"}]


def scalars(run_path: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_tensorboard(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    for report in (Report("phase", 0, "rollout"), STEP_1, STEP_2, EVAL):
        sink.write(report)
    # Before it is closed: a run that is killed has its curves up to there.
    assert scalars(tmp_path, "reward/mean") == [(1, 0.5), (2, 0.75)]
    sink.close()
    assert scalars(tmp_path, "eval/reward_mean") == [(2, pytest.approx(0.6))]
    [(_, first), (_, second)] = scalars(tmp_path, "loss/actor")
    assert first == -0.25 and math.isnan(second)


@pytest.mark.parametrize("tensorboard", [True, False])
def test_sinks_of_a_run(tensorboard: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(observe={"tensorboard": tensorboard, "console": "lines"}, train={"num_steps": 7})
    with make_sinks(config, tmp_path, Console("lines")) as sinks:
        assert isinstance(sinks, Sinks)
        sinks.write(STEP_1)
    assert "step 1/7" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").is_file()
    assert (tmp_path / "tensorboard").is_dir() is tensorboard


def test_sinks_are_closed_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    for sink in (Console, JsonLines, TensorBoard):
        monkeypatch.setattr(sink, "close", lambda self: closed.append(type(self).__name__))
    with pytest.raises(RuntimeError, match="crash"), make_sinks(make_config(), tmp_path, Console("quiet")):
        raise RuntimeError("crash")
    assert sorted(closed) == ["Console", "JsonLines", "TensorBoard"]


def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    config = make_config(observe={"wandb": {"project": "tests", "mode": "offline"}})
    messages: list[str] = []
    sink = Wandb(config, tmp_path, messages.append)
    for step in (1, 2, 3, 2, 3, 4):
        sink.write(Report("step", step, metrics={"reward/mean": 0.5}))
    sink.close()
    assert list((tmp_path / "wandb").rglob("*.wandb")), "an offline run is a file for `wandb sync`"
    # Number 34: W&B drops what is logged for a step below its own; before, without a word here.
    [warning] = messages
    assert "cannot replace them" in warning and "metrics.jsonl has the new values from step 2 on" in warning


@pytest.mark.parametrize("same_process", [True, False])
def test_34_tensorboard_hides_what_an_earlier_attempt_logged(
    same_process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged up to 13, resumed from the checkpoint of step 10. Before: two values for 11, 12 and 13."""
    # The two files of one second would be read in the wrong order: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    sink = TensorBoard(tmp_path)
    for step in range(1, 14):
        sink.write(Report("step", step, metrics={"loss/actor": 1.0}))
    sink.write(EVAL)
    if not same_process:
        sink = TensorBoard(tmp_path)
    for step in range(11, 15):
        sink.write(Report("step", step, metrics={"loss/actor": 2.0}))
    sink.close()
    seen = scalars(tmp_path, "loss/actor")
    assert seen == [(step, 1.0 if step < 11 else 2.0) for step in range(1, 15)]
    assert [step for step, _ in scalars(tmp_path, "eval/reward_mean")] == [2]


def test_a_failure_is_reported_with_its_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(observe={"tensorboard": False, "console": "lines"})
    with make_sinks(config, tmp_path, Console("lines")) as sinks:
        sinks.write(Report("phase", 4, "update actor"))
        sinks.write(Report("failure", 4, "actor worker 1 died", then="the workers start again from step 4"))
    assert (
        "warning: actor worker 1 died after step 4, in update actor; the workers start again from step 4"
        in capsys.readouterr().out
    )
