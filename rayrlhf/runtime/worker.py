"""What the worker of every training loop does beside training: steps, clocks, reports, checkpoints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayrlhf.config.common import JobConfig
from rayrlhf.observe.metrics import Timer
from rayrlhf.placement.reaper import sit_down
from rayrlhf.reward.client import RewardFailure
from rayrlhf.runtime.reporting import Reporter
from rayrlhf.runtime.scratch import scratch_of
from rayrlhf.train import collectives
from rayrlhf.train.checkpoint import LoopState, Saved, save
from rayrlhf.train.manifest import DamagedCheckpoint
from rayrlhf.train.random_states import RandomStates

# Failures that a restart of the workers would only repeat: the run ends and says why.
FINAL_FAILURES = (RewardFailure, FloatingPointError, DamagedCheckpoint)

AUTO_CHECKPOINT_SECONDS = 15 * 60.0  # what checkpoint.every_steps=auto risks to lose

Loop = Callable[[dict[str, Any]], dict[str, Any]]


def stops_cleanly(loop: Loop) -> Loop:
    """Turn a final failure into a result, so that Ray Train does not restart the workers for it. Every other
    one is reported by `worker_failures`.
    """

    @functools.wraps(loop)
    def wrapped(arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return loop(arguments)
        except FINAL_FAILURES as failure:
            return {"failure": f"{type(failure).__name__}: {failure}"}

    return wrapped


class TrainingWorker:
    """One rank. Subclasses give `saved`, what has shards in a checkpoint."""

    def __init__(
        self, config: JobConfig, *, run_id: str, board: str, threads: int, fixed: dict[str, Any]
    ) -> None:
        self.config = config
        self.fixed = fixed
        self.scratch = scratch_of(Path(config.run.path), run_id)
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        sit_down(run_id, "actor", self.rank)
        torch.set_num_threads(threads)
        torch.manual_seed(config.run.seed)  # as on all ranks, for models that begin at random
        self.state = LoopState()
        self.reporter = Reporter(board, self.rank)
        self.timer = Timer()
        self.started = self.step_started = self.saved_at = time.perf_counter()

    @property
    def saved(self) -> Sequence[Saved]:
        raise NotImplementedError

    def own_random_states(self) -> RandomStates:
        """From here on this rank's random numbers are its own: to be called when its models are loaded."""
        return RandomStates(self.config.run.seed, rank=self.rank, world_size=self.world_size)

    def count_steps(self) -> Iterator[int]:
        """The steps from where the run stands to its end."""
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
        return collectives.max_over_ranks(float(due and self.rank == 0)) > 0

    def save_state(self, elsewhere: Sequence[Path] = ()) -> None:
        """Collective. `elsewhere`: folders that belong to the checkpoint."""
        self.keep_time()
        save(self.state, self.saved, self.scratch, fixed=self.fixed, elsewhere=elsewhere)
        self.saved_at = time.perf_counter()

    def result(self, *, after: dict[str, Any], export: str | None) -> dict[str, Any]:
        """What the summary is made of; the loop's return value."""
        self.keep_time()
        self.reporter.flush()
        return {
            "before": self.state.eval_before,
            "after": after,
            "best": self.state.best,
            "steps": self.state.step,
            "seconds_per_phase": self.state.seconds_per_phase,
            "seconds_total": self.state.seconds_total,
            "export": export,
        }

    # Telling what happens

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
