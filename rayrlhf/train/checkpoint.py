"""Checkpoints under Ray Train: every rank saves its shard, and a folder per step holds them all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from rayrlhf.train import collectives, manifest

STATE_FILE = "state.json"
TRAIN_FOLDER = "checkpoints"  # Ray Train's, in the run's folder
RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's, of the checkpoints that it knows
ELSEWHERE = "elsewhere"  # in the manifest: what lies elsewhere, as paths from the folder of checkpoints


class Saved(Protocol):
    """Anything with shards of its own: a learner, a critic."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass
class LoopState:
    """What a loop needs beside its learners' shards to go on where it stopped."""

    step: int = 0  # optimizer steps done = the policy version = the next step's index
    first_prompt_batch: int = 0  # of the prompts' stream, that some rank has not fetched
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


def save(
    state: LoopState,
    saved: Sequence[Saved],
    scratch: Path,
    *,
    fixed: Mapping[str, Any],
    elsewhere: Sequence[Path] = (),
) -> None:
    """Write a checkpoint into the run's storage, whole or not at all. Collective.

    `fixed`: what it can only be resumed with. `elsewhere`: folders with a manifest of their own that belong
    to it. `scratch` is this start's alone; what workers that died have left there goes.
    """
    own = _own_folder(scratch, state.step)
    for item in saved:
        item.save(own)
    if collectives.rank() == 0:
        (own / STATE_FILE).write_text(json.dumps(asdict(state)))
    context: Any = ray.train.get_context().get_storage()
    storage = Path(context.experiment_fs_path)
    folder = storage / checkpoint_name(state.step)
    metrics = {"step": state.step, "first_prompt_batch": state.first_prompt_batch, "fixed": dict(fixed)}
    paths = [os.path.relpath(path, storage) for path in elsewhere]
    manifest.commit(own, folder, {"metrics": metrics, ELSEWHERE: paths})
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=folder.name,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,  # it is there
    )
    if collectives.rank() == 0:
        clear(scratch)


def _own_folder(scratch: Path, step: int) -> Path:
    """An empty folder of this rank's."""
    if collectives.rank() == 0:
        clear(scratch)
        scratch.mkdir(parents=True, exist_ok=True)
    collectives.max_over_ranks(0.0)  # nobody writes before that
    own = scratch / f"{checkpoint_name(step)}-rank-{collectives.rank():04d}"
    own.mkdir()
    return own


def restore(saved: Sequence[Saved]) -> LoopState:
    """The newest checkpoint's state, its shards loaded; a fresh state when there is none. Collective.

    Raises `DamagedCheckpoint`.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return LoopState()
    with checkpoint.as_directory() as name:
        folder = Path(name)
        _check(folder)
        for item in saved:
            item.load(folder)
        return _loop_state(json.loads((folder / STATE_FILE).read_text()))


def _loop_state(saved: dict[str, Any]) -> LoopState:
    """Checkpoints made before November 2026 say `first_draw`."""
    if "first_draw" in saved:
        saved["first_prompt_batch"] = saved.pop("first_draw")
    return LoopState(**saved)


def _check(folder: Path) -> None:
    """What may have happened since the driver looked, or since these workers' predecessors saved it, and
    whether loading would run code. Every rank raises the same. Collective.
    """
    from rayrlhf.train.safe_load import strange_files  # and with it DeepSpeed, which the driver does without

    found = manifest.read(folder) if collectives.rank() == 0 else None
    why = found and manifest.damage(folder, found["files"], full=False)
    [why, *_] = collectives.gather_lists([why])
    if why:
        fix = "Fix: the same command goes on from the newest whole checkpoint"
        raise manifest.DamagedCheckpoint(f"{folder}: {why}. {fix}")
    mine = sorted(folder.rglob("*.pt"))[collectives.rank() :: collectives.world_size()]
    if strange := collectives.gather_lists(strange_files(mine)):
        raise manifest.DamagedCheckpoint(
            f"{'; '.join(strange)}. Nothing of it was run. rayrlhf saves no such thing: somebody has changed "
            "the checkpoint. Fix: put it back, delete it to go on from the one before, or choose another "
            "run.name"
        )


def clear(folder: Path) -> None:
    """Everything in there goes; what links lead to stays."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def newest_step(storage: Path) -> int:
    """The step of the newest committed checkpoint under a Ray Train run's folder; 0 when there is none."""
    return _newest_metrics(storage)["step"]


def newest_first_prompt_batch(storage: Path) -> int:
    """Where the stream of prompts goes on after the newest committed checkpoint; 0 when there is none."""
    metrics = _newest_metrics(storage)
    return metrics["first_prompt_batch"] if "first_prompt_batch" in metrics else metrics["first_draw"]


def _newest_metrics(storage: Path) -> dict[str, Any]:
    """What was reported with the newest checkpoint, by Ray Train's own record, which the driver has seen to
    (`train.find`).
    """
    record = storage / RECORD
    newest = json.loads(record.read_text()).get("latest_checkpoint_result") if record.is_file() else None
    return newest["metrics"] if newest else {"step": 0, "first_prompt_batch": 0}
