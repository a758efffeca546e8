"""Lines of the console in a log, which no text can break."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console

Captured = pytest.CaptureFixture[str]
METRICS = {
    "reward/mean": 0.25,
    "kl/mean": 0.01234,
    "rollout/response_tokens_mean": 27.6,
    "rollout/tokens_per_second": 1234.4,
    "train/tokens_per_second": 987.0,
    "time/step": 30.0,
    "loss/actor": 5.0,
}
EVALUATION = {
    "eval/reward_mean": 0.5,
    "eval/reward_ci_low": -0.25,
    "eval/reward_ci_high": 1.25,
    "eval/response_tokens_mean": 27.6,
}
SUMMARY = {
    "steps": 16,
    "seconds_total": 125.0,
    "reward_before": 0.125,
    "reward_before_ci": [0.1, 0.15],
    "reward_after": 0.5,
    "reward_after_ci": [0.4, 0.6],
    "seconds_per_phase": {"rollout": 100.0},
    "samples": [],
    "export": "runs/demo/export",
}


def step(number: int, metrics: dict[str, float]) -> Report:
    return Report("step", number, metrics=metrics)


def test_a_step_is_a_line(capsys: Captured) -> None:
    console = Console("lines")
    console.start(10)
    console.write(step(1, METRICS))
    console.write(step(2, METRICS | {"time/step": 10.0}))
    first, second = capsys.readouterr().out.splitlines()
    # 9 steps at 30 s are left, then 8 at the mean of 20 s.
    values = "reward +0.250  kl 0.0123  response 28 tok  rollout 1234 tok/s  update 987 tok/s"
    assert re.fullmatch(rf" +0:\d\d step 1/10  {re.escape(values)}  step 30.0 s  left 4:30 min", first)
    assert re.fullmatch(rf" +0:\d\d step 2/10  {re.escape(values)}  step 10.0 s  left 2:40 min", second)


def test_a_step_without_metrics_is_a_line_too(capsys: Captured) -> None:
    console = Console("lines")
    console.start(3)
    console.write(step(1, {}))
    assert capsys.readouterr().out.strip().endswith("step 1/3    left 0:00 min")


def test_a_line_of_a_log_is_never_broken_in_two(capsys: Captured) -> None:
    console = Console("lines")
    console.say("placed rollout x 64 on slot " + ", ".join(f"{i} (abcdef:gpu{i % 8})" for i in range(64)))
    assert len(capsys.readouterr().out.splitlines()) == 1
    console.start(100_000)
    large = {"rollout/tokens_per_second": 123456.0, "train/tokens_per_second": 123456.0, "time/step": 1234.5}
    console.write(step(10_000, METRICS | large))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_evaluation_is_a_line(capsys: Captured) -> None:
    Console("lines").write(Report("eval", 4, "during", metrics=EVALUATION))
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith(
            "evaluation during step 4: reward +0.500 (95 % interval -0.250 to +1.250), responses 28 tok"
        )
    )


def test_phases_are_printed_until_the_first_step_is_done(capsys: Captured) -> None:
    console = Console("lines")
    console.start(2)
    for report in (
        Report("phase", 0, "loading the actor"),
        Report("phase", 0, "rollout 3/8 prompts"),  # one of many: only a live line shows these
        step(1, METRICS),
        Report("phase", 1, "rollout"),
    ):
        console.write(report)
    out = capsys.readouterr().out
    assert "loading the actor" in out and "3/8" not in out and len(out.splitlines()) == 2


def test_rollouts_are_not_printed(capsys: Captured) -> None:
    Console("lines").write(Report("rollouts", 1, rows=[{"prompt": "p"}]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text", ["no file [/data/train.jsonl]", "pip install rayrlhf[cpu]", "got [1, 5], wanted [b]"]
)
def test_brackets_in_a_text_are_text(text: str, capsys: Captured) -> None:
    console = Console("lines")
    console.say(text)
    console.error(text)
    captured = capsys.readouterr()
    assert captured.out.strip().endswith(text)
    assert captured.err == f"error {text}\n"


def test_an_error_is_not_wrapped(capsys: Captured) -> None:
    text = "word " * 200 + "end"
    Console("lines").error(text)
    captured = capsys.readouterr()
    assert captured.err == f"error {text}\n" and captured.out == ""


def test_quiet_is_errors_and_the_summary(capsys: Captured, tmp_path: Path) -> None:
    console = Console("quiet")
    console.start(2)
    console.say("hello")
    console.write(step(1, METRICS))
    console.write(Report("eval", 1, "during", metrics=EVALUATION))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    console.summary(tmp_path)
    console.error("no more")
    captured = capsys.readouterr()
    assert "+0.500" in captured.out and captured.err == "error no more\n"


def test_auto_is_lines_in_a_log() -> None:
    assert Console("auto").mode == "lines"
    assert Console("live").mode == "live"


def test_a_live_run_shows_the_same_steps(capsys: Captured) -> None:
    console = Console("live")
    console.start(2)
    for report in (Report("phase", 0, "rollout [/b] 1/8 prompts"), step(1, METRICS), step(2, METRICS)):
        console.write(report)
    console.close()
    console.close()  # the end of a run and an error may both come
    out = capsys.readouterr().out
    assert "step 1/2" in out and "step 2/2" in out


def test_no_log_is_silent_after_the_last_step_or_for_long(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console("lines")
    console.start(2)
    for report in (
        step(1, METRICS),
        Report("phase", 1, "rollout 1/8 prompts"),
        step(2, METRICS),
        Report("phase", 2, "score training rows"),
        Report("phase", 2, "score training rows 0/600"),
    ):
        console.write(report)
    monkeypatch.setattr(console, "said_at", console.said_at - 11.0)
    console.write(Report("phase", 2, "score training rows 128/600"))
    console.write(Report("phase", 2, "score training rows 144/600"))
    lines = [line.partition(":")[2][3:] for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == ["score training rows", "score training rows 128/600"]


def test_events_are_in_every_log(capsys: Captured) -> None:
    console = Console("lines")
    console.start(9)
    for report in (step(4, METRICS), Report("event", 4, "resuming after step 4")):
        console.write(report)
    assert "resuming after step 4" in capsys.readouterr().out
