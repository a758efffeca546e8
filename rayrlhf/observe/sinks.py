"""Sinks of reports: console, TensorBoard, Weights & Biases, JSON lines."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from rayrlhf.config.common import JobConfig
from rayrlhf.observe.board import Report, Taker
from rayrlhf.observe.console import Console
from rayrlhf.observe.sink_threads import Sink, SinkThread
from rayrlhf.observe.step_rows import StepRows, json_line
from rayrlhf.secrets import masked, masked_tree

TAKE_SECONDS = 1.0
RETRY_SECONDS = 0.2
DRAIN_DEADLINE_SECONDS = 30.0


class JsonLines:
    """`metrics.jsonl` (one line per step or evaluation), `rollouts.jsonl`, `eval/<when>-<step>.jsonl`; each
    step once, also after a resume. Rows of earlier attempts are in `superseded.jsonl`.
    """

    def __init__(self, run_path: Path) -> None:
        self.run_path = run_path
        self.metrics = StepRows(run_path / "metrics.jsonl")
        self.rollouts = StepRows(run_path / "rollouts.jsonl")

    def write(self, report: Report) -> None:
        # NaN (an undefined explained variance, say) is not JSON.
        known = {key: value if math.isfinite(value) else None for key, value in report.metrics.items()}
        if report.kind == "step":
            if self.metrics.take_back(report.step):
                self.rollouts.take_back(report.step)
                self._take_back_evaluations(report.step)
            self.metrics.add(report.step, [{"step": report.step, **known}])
        if report.kind == "rollouts":
            self.rollouts.take_back(report.step)
            self.rollouts.add(report.step, report.rows)
        if report.kind == "eval":
            file = self.run_path / "eval" / f"{report.text}-{report.step:06d}.jsonl"
            if file.exists():  # the one after the last step, or before the first, of a resumed run
                self.metrics.take_back_last(report.step, b'"eval/')
                self._take_back_evaluation(file)
            self.metrics.add(report.step, [{"step": report.step, **known}])
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(map(json_line, report.rows)), encoding="utf-8")

    def _take_back_evaluations(self, step: int) -> None:
        """Move the evaluations of this step and later ones."""
        for file in (self.run_path / "eval").glob("*-*.jsonl"):
            at = file.stem.rpartition("-")[2]
            if at.isdecimal() and int(at) >= step:
                self._take_back_evaluation(file)

    def _take_back_evaluation(self, file: Path) -> None:
        """Rename it, with a number: `superseded/during-000012.2.jsonl` is the second."""
        folder = file.parent / "superseded"
        folder.mkdir(exist_ok=True)
        before = sum(1 for _ in folder.glob(f"{file.stem}.*.jsonl"))
        file.rename(folder / f"{file.stem}.{before + 1}.jsonl")

    def close(self) -> None:
        pass


class TensorBoard:
    """If steps are logged again, TensorBoard hides the curves of the earlier attempt from there on."""

    def __init__(self, run_path: Path) -> None:
        self.folder = run_path / "tensorboard"
        self.is_resumed = any(self.folder.glob("events.*"))
        self.writer: Any = None
        self.last_step = -1
        self._open(None)

    def write(self, report: Report) -> None:
        if not report.metrics:
            return
        # An evaluation has the step that was logged before it, whose other curves are kept.
        first = report.step if report.kind == "step" else report.step + 1
        if self.is_resumed or (report.kind == "step" and report.step <= self.last_step):
            self.writer.close()
            self._open(first)
            self.is_resumed = False
        if report.kind == "step":
            self.last_step = report.step
        for key, value in report.metrics.items():
            self.writer.add_scalar(key, value, report.step)
        self.writer.flush()

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Files are read in the order of their names, which begin with the second of their creation; within
        # one second a counter that is compared as text would decide.
        while any(self.folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Steps in W&B only increase: of steps logged again it keeps the values of the earlier attempt."""

    def __init__(self, config: JobConfig, run_path: Path, say: Callable[[str], None]) -> None:
        import wandb

        settings = config.observe.wandb
        assert settings is not None
        self.say = say
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=config.run.name,
            id=config.run.name,
            resume="allow",
            dir=str(run_path),
            config=masked_tree(config.model_dump(mode="json")),
            settings=wandb.Settings(
                # Its metadata has the command line, which may hold secrets that the config masks.
                x_disable_meta=any(masked(word) != word for word in sys.argv),
                # It would capture the terminal's output, and print several lines in colour around a run.
                console="off",
                silent=True,
            ),
        )
        if self.run.url:
            self.say(f"Weights & Biases: {self.run.url}")
        self.is_behind = False

    def write(self, report: Report) -> None:
        if not report.metrics:
            return
        if report.step < self.run.step:
            self._warn_once(report.step, self.run.step)
            return
        self.is_behind = False
        self.run.log(report.metrics, step=report.step)

    def _warn_once(self, step: int, reached: int) -> None:
        """Warn once each time that the run falls back to an earlier step."""
        if not self.is_behind:
            self.is_behind = True
            self.run.summary["steps_kept_from_an_earlier_attempt"] = f"{step} to {reached - 1}"
            self.say(
                f"warning: W&B has steps up to {reached} from before the restart and cannot replace them: "
                f"its curves continue at step {reached}; metrics.jsonl has the new values from step {step} on"
            )

    def close(self) -> None:
        self.run.finish()


class Sinks:
    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks
        self.phase = Report("phase", 0, "start")  # the newest

    def write(self, report: Report) -> None:
        """To all of them; a failure becomes a warning that says in which phase it happened."""
        if report.kind == "phase":
            self.phase = report
        elif report.kind == "failure":
            when = f"after step {self.phase.step}, in {self.phase.text}"
            report = Report("warning", report.step, f"{report.text} {when}; {report.then}")
        for sink in self.sinks:
            sink.write(report)


@contextmanager
def make_sinks(config: JobConfig, run_path: Path, console: Console) -> Iterator[Sinks]:
    """The sinks of a run, which are flushed and closed on exit."""
    console.start(config.train.total_steps)
    makers: dict[str, Callable[[], Sink]] = {
        "metrics.jsonl": lambda: JsonLines(run_path),
        "the console": lambda: console,
    }
    if config.observe.tensorboard:
        makers["TensorBoard"] = lambda: TensorBoard(run_path)
    if config.observe.wandb is not None:
        makers["Weights & Biases"] = lambda: Wandb(config, run_path, console.say)
    with ExitStack() as stack:
        sinks: list[SinkThread] = []
        for name, make in makers.items():
            sink = SinkThread(name, make, lambda text: console.say(f"warning: {text}"))
            sinks.append(sink)
            stack.callback(sink.close)
        yield Sinks(sinks)


@contextmanager
def drain_in_background(board: Any, sinks: Sinks) -> Iterator[None]:
    """Pass the board's reports to the sinks in a thread while the body runs, and the last ones on exit."""
    stop = threading.Event()
    taker = Taker()

    def take(seconds: float) -> list[Report]:
        """Waits for a board whose process died; `RayActorError` when it will not come back."""
        while True:
            try:
                name, waiting = ray.get(board.take.remote(seconds, taker.last_taken))
                return taker.new(name, waiting, last_call=seconds == 0.0)
            except ActorUnavailableError:
                time.sleep(RETRY_SECONDS)

    def drain() -> None:
        while True:
            stopping = stop.is_set()
            reports = take(0.0 if stopping else TAKE_SECONDS)
            for report in reports:
                sinks.write(report)
            if stopping and not reports:
                return

    thread = threading.Thread(target=drain, daemon=True, name="metrics")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(DRAIN_DEADLINE_SECONDS)
