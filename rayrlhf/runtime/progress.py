"""Progress of one rank in a run: current step, timers, reports and checkpoints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray.train
import torch

from rayrlhf.config.common import JobConfig
from rayrlhf.models.load import choose_products
from rayrlhf.observe.metric_keys import Timer
from rayrlhf.placement.reaper import register_worker
from rayrlhf.reward.client import RewardFailure
from rayrlhf.runtime.reporting import Reporter
from rayrlhf.runtime.results import RunResult, Stopped
from rayrlhf.runtime.scratch import own_scratch, scratch_of
from rayrlhf.storage.folder import Folder, run_folder
from rayrlhf.train.checkpoint import TRAIN_FOLDER, LoopState, Saved, Saving, restore
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.manifest import DamagedCheckpoint

# Failures that would recur after a restart of the workers: the run ends with the reason.
FINAL_FAILURES = (RewardFailure, FloatingPointError, DamagedCheckpoint)

AUTO_CHECKPOINT_SECONDS = 15 * 60.0  # of training lost at most with checkpoint.every_steps=auto

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def stops_cleanly(
    loop: Callable[Arguments, Result],
) -> Callable[Arguments, Result | Stopped]:
    """Decorator: turn a final failure into a result, so that Ray Train does not restart the workers. All
    other failures are reported by `worker_failures`.
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
    """Saves and restores this rank's checkpoints under Ray Train."""

    storage: Folder
    scratch: Path  # of this start of the run
    fixed: dict[str, Any] = field(default_factory=dict)  # config values required for resuming
    own_disk: Path | None = None  # scratch of this node, for checkpoints that are completed in the background
    pending: Saving | None = None

    def node_to_be_reclaimed(self) -> str | None:
        """Notice that a worker's node is about to be taken away (a spot instance, maintenance); None without
        one. Collective.
        """
        info = ray.train.get_preemption_info()
        if info is None:
            return None
        seconds = "" if info.deadline_ms is None else f" in {info.deadline_ms / 1000 - time.time():.0f} s"
        ranks = ", ".join(map(str, info.preempted_ranks))
        return f"the node of rank {ranks} is to be taken away{seconds}"

    def restore(self, saved: Sequence[Saved]) -> LoopState:
        return restore(saved)

    def save(self, state: LoopState, saved: Sequence[Saved], elsewhere: Sequence[str]) -> None:
        """Collective. With `own_disk`, training goes on while the files are copied or uploaded."""
        self.finish()
        self.pending = Saving(
            state,
            saved,
            self.storage,
            self.scratch,
            fixed=self.fixed,
            elsewhere=elsewhere,
            own_disk=self.own_disk,
        )
        if self.own_disk is None:
            self.finish()

    def finish(self) -> None:
        """Complete the checkpoint that is being saved. Collective."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.finish()


class Progress:
    """Counts steps, times phases, reports, and decides when checkpoints and evaluations are due."""

    def __init__(self, config: JobConfig, ranks: Ranks, reporter: Reporter, checkpoints: Checkpoints) -> None:
        self.config = config
        self.ranks = ranks
        self.reporter = reporter
        self.checkpoints = checkpoints
        self.state = LoopState()
        self.saved_on_notice = False
        self.timer = Timer()
        self.started = self.step_started = self.saved_at = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """Iterate over the remaining steps."""
        for step in range(self.state.step, self.config.train.total_steps):
            self.step_started = time.perf_counter()
            yield step

    def is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.state.step % every_steps == 0

    def is_last(self) -> bool:
        return self.state.step >= self.config.train.total_steps

    def checkpoint_is_due(self) -> bool:
        """According to `checkpoint.every_steps`; with "auto", by rank 0's clock for all ranks. Also, once,
        when a node is about to be taken away. Collective.
        """
        pending = self.checkpoints.pending
        if pending is not None and self.ranks.min(float(pending.is_ready)) > 0:
            self.checkpoints.finish()
        notice = self.checkpoints.node_to_be_reclaimed()
        if notice is not None and not self.saved_on_notice:
            self.saved_on_notice = True
            self.announce(f"{notice}: saving a checkpoint, from which the run goes on with another node")
            return True
        every_steps = self.config.checkpoint.every_steps
        if every_steps != "auto":
            return self.is_due(every_steps)
        due = time.perf_counter() - self.saved_at >= AUTO_CHECKPOINT_SECONDS
        return self.ranks.max(float(due and self.ranks.rank == 0)) > 0

    def restore(self, saved: Sequence[Saved]) -> None:
        """Load the newest checkpoint, if there is one. Collective."""
        self.state = self.checkpoints.restore(saved)
        if self.state.step:
            without = "" if self.state.has_optimizer else "; the optimizer's moments start from zero"
            self.announce(f"resuming after step {self.state.step}{without}")

    def save(self, saved: Sequence[Saved], elsewhere: Sequence[str] = ()) -> None:
        """Save a checkpoint. Collective. `elsewhere`: other folders in the run's that belong to it."""
        self.keep_time()
        self.state.has_optimizer = self.config.checkpoint.optimizer
        self.checkpoints.save(self.state, saved, elsewhere)
        if self.saved_on_notice:  # there may be no next step
            self.checkpoints.finish()
        self.saved_at = time.perf_counter()

    def result(self, *, after: dict[str, Any], export: str | None) -> RunResult:
        self.checkpoints.finish()
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
        """Report an event, which appears in every log even when the console shows less."""
        self.reporter.event(self.state.step, text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.say(name.replace("_", " "))
        with self.timer(name):
            yield

    def step_seconds(self) -> dict[str, float]:
        """`time/<phase>` of the step that ends now."""
        self.timer.seconds["step"] += time.perf_counter() - self.step_started
        seconds = self.timer.drain()
        self.state.add_seconds(seconds)
        return seconds

    def keep_time(self) -> None:
        """Add the timers' readings to the state that a resumed run continues from."""
        self.state.add_seconds(self.timer.drain())
        now = time.perf_counter()
        self.state.seconds_total += now - self.started
        self.started = now


def start_worker(
    config: JobConfig, *, run_id: str, board: str, threads: int, fixed: dict[str, Any]
) -> Progress:
    """First call of every training worker: register its location, set the number of threads, and seed the
    initialisation of models.
    """
    ranks = Ranks()
    register_worker(run_id, "actor", ranks.rank)
    torch.set_num_threads(threads)
    torch.manual_seed(config.run.seed)  # the same on all ranks
    reporter = Reporter(board, ranks.rank)
    products = choose_products(config.model, config.model.path, ranks.device)
    if products is not None and products.bf16:
        reporter.say(0, f"{products}")
    own_disk = own_scratch(Path(config.run.local_path), run_id)
    checkpoints = Checkpoints(
        run_folder(config.run, TRAIN_FOLDER),
        scratch_of(Path(config.run.path), run_id),
        fixed,
        own_disk if config.checkpoint.asynchronous else None,
    )
    return Progress(config, ranks, reporter, checkpoints)
