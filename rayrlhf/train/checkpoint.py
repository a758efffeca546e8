"""Checkpoints under Ray Train: every rank saves its shard, Ray merges them into one folder per step."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from rayrlhf.train import collectives

STATE_FILE = "state.json"
TRAIN_FOLDER = "checkpoints"  # Ray Train's, in the run's folder


class Saved(Protocol):
    """Anything with shards of its own: a learner, a critic."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass
class LoopState:
    """What a loop needs beside its learners' shards to go on where it stopped."""

    step: int = 0  # optimizer steps done = the policy version = the next step's index
    first_draw: int = 0  # of the prompts' stream, that some rank has not fetched
    kl_controller: dict[str, float] = field(default_factory=dict)
    reward_normalizers: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)  # step and reward of the best evaluation
    eval_before: dict[str, Any] = field(default_factory=dict)  # the evaluation before the first step
    seconds_per_phase: dict[str, float] = field(default_factory=dict)
    seconds_total: float = 0.0

    def add_seconds(self, timed: dict[str, float]) -> None:
        """Add a timer's `time/<phase>` seconds; the whole step's is left out, its phases are in it."""
        for key, seconds in timed.items():
            phase = key.removeprefix("time/")
            if phase != "step":
                self.seconds_per_phase[phase] = self.seconds_per_phase.get(phase, 0.0) + seconds


def save(state: LoopState, saved: Sequence[Saved], scratch: Path, *, fixed: Mapping[str, Any]) -> None:
    """Write a checkpoint and wait until it is in the run's storage. Collective. `fixed`: the keys of the
    config whose values it can only be resumed with.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"step-{state.step:06d}-rank-{collectives.rank()}-", dir=scratch))
    for item in saved:
        item.save(folder)
    if collectives.rank() == 0:
        (folder / STATE_FILE).write_text(json.dumps(asdict(state)))
    ray.train.report(
        {"step": state.step, "first_draw": state.first_draw, "fixed": dict(fixed)},
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=checkpoint_name(state.step),
        checkpoint_upload_mode=CheckpointUploadMode.SYNC,
        delete_local_checkpoint_after_upload=True,
    )
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another rank of this node is still saving
        scratch.rmdir()


def restore(saved: Sequence[Saved]) -> LoopState:
    """The newest checkpoint's state, its shards loaded; a fresh state when there is none. Collective."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return LoopState()
    with checkpoint.as_directory() as folder:
        for item in saved:
            item.load(Path(folder))
        return LoopState(**json.loads((Path(folder) / STATE_FILE).read_text()))


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def newest_step(storage: Path) -> int:
    """The step of the newest committed checkpoint under a Ray Train run's folder; 0 when there is none."""
    return _newest_metrics(storage)["step"]


def newest_first_draw(storage: Path) -> int:
    """Where the stream of prompts goes on after the newest committed checkpoint; 0 when there is none."""
    return _newest_metrics(storage)["first_draw"]


def newest_fixed(storage: Path) -> dict[str, Any] | None:
    """The values of the config that the newest committed checkpoint can only be resumed with; None for one of
    a version that did not write them.
    """
    return _newest_metrics(storage).get("fixed")


def _newest_metrics(storage: Path) -> dict[str, Any]:
    """What was reported with the newest checkpoint."""
    snapshot = storage / "checkpoint_manager_snapshot.json"
    newest = json.loads(snapshot.read_text()).get("latest_checkpoint_result") if snapshot.is_file() else None
    return newest["metrics"] if newest else {"step": 0, "first_draw": 0, "fixed": {}}
