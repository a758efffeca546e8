"""A sink that fails or hangs loses its own reports and nothing else."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from rayrlhf.observe import sinks as sinks_module
from rayrlhf.observe.board import Report
from rayrlhf.observe.console import Console
from rayrlhf.observe.sink_threads import SinkThread
from rayrlhf.observe.sinks import make_sinks
from tests.samples import make_config


class Kept:
    """Keeps steps; fails while `problem` is set, hangs while `gate` is closed."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.problem: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def write(self, report: Report) -> None:
        assert self.gate.wait(60)
        if self.problem is not None:
            raise self.problem
        self.steps.append(report.step)

    def close(self) -> None:
        self.closed = True


def step(number: int) -> Report:
    return Report("step", number, metrics={"reward/mean": 0.5})


def test_reports_arrive_in_order_and_the_sink_is_closed() -> None:
    sink, warnings = Kept(), list[str]()
    thread = SinkThread("a file", lambda: sink, warnings.append)
    for number in range(5):
        thread.write(step(number))
    thread.close()
    assert sink.steps == [0, 1, 2, 3, 4] and sink.closed and warnings == []


def test_a_full_disk_drops_the_sink_with_one_warning() -> None:
    sink, warnings = Kept(), list[str]()
    sink.problem = OSError(28, "No space left on device")
    thread = SinkThread("metrics.jsonl", lambda: sink, warnings.append)
    for number in range(5):
        thread.write(step(number))
    thread.close()
    assert sink.steps == [] and thread.num_lost == 5
    assert warnings == [
        "metrics.jsonl cannot be written (OSError: [Errno 28] No space left on device); the run "
        "continues without it, with a retry every 60 s",
        "metrics.jsonl lacks 5 reports of this run",
    ]


def test_a_disk_with_room_again_is_written_again() -> None:
    sink, warnings = Kept(), list[str]()
    sink.problem = OSError("full")
    thread = SinkThread("a file", lambda: sink, warnings.append, retry_seconds=0.0)
    thread.write(step(0))
    wait_until(lambda: len(warnings) == 1)
    sink.problem = None
    thread.write(step(1))
    wait_until(lambda: sink.steps == [1])
    thread.close()
    assert warnings[1:] == [
        "a file is written again; 1 reports are missing from it",
        "a file lacks 1 reports of this run",
    ]


def test_a_sink_that_cannot_be_made_is_tried_again() -> None:
    sink, warnings, attempts = Kept(), list[str](), [ConnectionError("no route to host")]

    def make() -> Kept:
        if attempts:
            raise attempts.pop()
        return sink

    thread = SinkThread("Weights & Biases", make, warnings.append, retry_seconds=0.0)
    wait_until(lambda: len(warnings) == 1)
    thread.write(step(1))
    thread.close()
    assert sink.steps == [1]
    assert warnings[0].startswith("Weights & Biases cannot be written (ConnectionError: no route to host)")


def test_the_queue_of_a_sink_that_hangs_is_bounded_and_blocks_no_other() -> None:
    slow, fast, warnings = Kept(), Kept(), list[str]()
    slow.gate.clear()
    hanging = SinkThread("a server", lambda: slow, warnings.append, max_reports=10)
    lively = SinkThread("a file", lambda: fast, warnings.append)
    for number in range(100):
        hanging.write(step(number))
        lively.write(step(number))
    wait_until(lambda: len(fast.steps) == 100)
    # Ten wait, and one may be in the sink's hands.
    assert 89 <= hanging.num_lost <= 90
    hanging.close(timeout_seconds=0.2)
    assert warnings == ["a server did not finish within 0.2 s: its last reports are missing"]
    slow.gate.set()
    lively.close()


def test_a_run_whose_metrics_file_cannot_be_written_keeps_its_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()  # as good as a full disk, for root too
    config = make_config(observe={"tensorboard": False, "console": "lines"}, train={"num_steps": 3})
    with make_sinks(config, tmp_path, Console("lines")) as sinks:
        for number in (1, 2, 3):
            sinks.write(step(number))
    out = " ".join(capsys.readouterr().out.split())
    assert "step 1/3" in out and "step 3/3" in out
    assert "warning: metrics.jsonl cannot be written (IsADirectoryError" in out
    assert "metrics.jsonl lacks 3 reports" in out


def test_weights_and_biases_down_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Down:
        def __init__(self, *_: object) -> None:
            raise ConnectionError("api unreachable")

    monkeypatch.setattr(sinks_module, "Wandb", Down)
    config = make_config(observe={"tensorboard": False, "wandb": {"project": "tests"}, "console": "lines"})
    with make_sinks(config, tmp_path, Console("lines")) as sinks:
        sinks.write(step(1))
    assert "Weights & Biases cannot be written (ConnectionError: api unreachable)" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
