"""One rank's place in a run: its step, its clocks, what it reports, and its checkpoints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from rayrlhf.config.common import JobConfig
from rayrlhf.observe.metric_keys import Timer
from rayrlhf.placement.reaper import register_worker
from rayrlhf.reward.client import RewardFailure
from rayrlhf.runtime.reporting import Reporter
from rayrlhf.runtime.results import RunResult, Stopped
from rayrlhf.runtime.scratch import scratch_of
from rayrlhf.train.checkpoint import LoopState, Saved, restore, save
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.manifest import DamagedCheckpoint

# Failures that a restart of the workers would only repeat: the run ends and says why.
FINAL_FAILURES = (RewardFailure, FloatingPointError, DamagedCheckpoint)

AUTO_CHECKPOINT_SECONDS = 15 * 60.0  # what checkpoint.every_steps=auto risks to lose

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def stops_cleanly(
    loop: Callable[Arguments, Result],
) -> Callable[Arguments, Result | Stopped]:
    """Turn a final failure into a result, so that Ray Train does not restart the workers for it. Every other
    one is reported by `worker_failures`.
    """

    @functools.wraps(loop)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result | Stopped:
        try:
            return loop(*args, **kwargs)
        except FINAL_FAILURES as failure:
            return Stopped(f"{type(failure).__name__}: {failure}")

    return wrapped


@dataclass
class Checkpoints:
    """Where this rank's checkpoints go and come from, under Ray Train."""

    scratch: Path  # of this start of the run
    fixed: dict[str, Any] = field(default_factory=dict)  # what the run can only be resumed with

    def restore(self, saved: Sequence[Saved]) -> LoopState:
        return restore(saved)

    def save(self, state: LoopState, saved: Sequence[Saved], elsewhere: Sequence[Path]) -> None:
        save(state, saved, self.scratch, fixed=self.fixed, elsewhere=elsewhere)


class Progress:
    """Counts steps, measures phases, reports, and says what is due."""

    def __init__(self, config: JobConfig, ranks: Ranks, reporter: Reporter, checkpoints: Checkpoints) -> None:
        self.config = config
        self.ranks = ranks
        self.reporter = reporter
        self.checkpoints = checkpoints
        self.state = LoopState()
        self.timer = Timer()
        self.started = self.step_started = self.saved_at = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The steps from where the run is to its end."""
        for step in range(self.state.step, self.config.train.total_steps):
            self.step_started = time.perf_counter()
            yield step

    def is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.state.step % every_steps == 0

    def is_last(self) -> bool:
        return self.state.step >= self.config.train.total_steps

    def checkpoint_is_due(self) -> bool:
        """By `checkpoint.every_steps`. With "auto" rank 0's clock decides for all ranks. Collective."""
        every_steps = self.config.checkpoint.every_steps
        if every_steps != "auto":
            return self.is_due(every_steps)
        due = time.perf_counter() - self.saved_at >= AUTO_CHECKPOINT_SECONDS
        return self.ranks.max(float(due and self.ranks.rank == 0)) > 0

    def restore(self, saved: Sequence[Saved]) -> None:
        """Load the newest checkpoint, if there is one. Collective."""
        self.state = self.checkpoints.restore(saved)
        if self.state.step:
            self.announce(f"resuming after step {self.state.step}")

    def save(self, saved: Sequence[Saved], elsewhere: Sequence[Path] = ()) -> None:
        """Collective. `elsewhere`: folders that belong to the checkpoint."""
        self.keep_time()
        self.checkpoints.save(self.state, saved, elsewhere)
        self.saved_at = time.perf_counter()

    def result(self, *, after: dict[str, Any], export: str | None) -> RunResult:
        self.keep_time()
        self.reporter.flush()
        state = self.state
        return RunResult(
            before=state.eval_before,
            after=after,
            best=state.best,
            steps=state.step,
            seconds_per_phase=state.seconds_per_phase,
            seconds_total=state.seconds_total,
            export=export,
        )

    # Reports

    def say(self, text: str) -> None:
        self.reporter.say(self.state.step, text)

    def announce(self, text: str) -> None:
        """What must be in every log, whatever else the console leaves out."""
        self.reporter.event(self.state.step, text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.say(name.replace("_", " "))
        with self.timer(name):
            yield

    def step_seconds(self) -> dict[str, float]:
        """`time/<phase>` of the step that ends here."""
        self.timer.seconds["step"] += time.perf_counter() - self.step_started
        seconds = self.timer.drain()
        self.state.add_seconds(seconds)
        return seconds

    def keep_time(self) -> None:
        """Move what the clocks hold into the state that a resumed run goes on from."""
        self.state.add_seconds(self.timer.drain())
        now = time.perf_counter()
        self.state.seconds_total += now - self.started
        self.started = now


def start_worker(
    config: JobConfig, *, run_id: str, board: str, threads: int, fixed: dict[str, Any]
) -> Progress:
    """What every training worker does first: register where it runs, threads, the seed for models that begin
    at random.
    """
    ranks = Ranks()
    register_worker(run_id, "actor", ranks.rank)
    torch.set_num_threads(threads)
    torch.manual_seed(config.run.seed)  # as on all ranks
    checkpoints = Checkpoints(scratch_of(Path(config.run.path), run_id), fixed)
    return Progress(config, ranks, Reporter(board, ranks.rank), checkpoints)
