"""Saves and restores training checkpoints under Ray Train: a folder per step with all ranks' shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from rayrlhf.storage.folder import Folder, LocalFolder, RemoteFolder
from rayrlhf.train import collectives, manifest

STATE_FILE = "state.json"
TRAIN_FOLDER = "checkpoints"  # Ray Train's storage, in the run's folder
RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's own list of checkpoints
ELSEWHERE = "elsewhere"  # manifest key: folders outside the checkpoint, relative to the folder of checkpoints
PARENT = "../"  # … so that they begin with this


class Saved(Protocol):
    """Anything that saves its own shards: a learner, a critic."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass
class LoopState:
    """State of a training loop, in addition to its learners' shards, that resuming needs."""

    step: int = 0  # optimizer steps done = the policy version = the next step's index
    first_prompt_batch: int = 0  # of the prompt stream: the first one that some rank has not fetched
    kl_controller: dict[str, float] = field(default_factory=dict)
    reward_normalizers: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)  # step and reward of the best evaluation
    eval_before: dict[str, Any] = field(default_factory=dict)  # the evaluation before the first step
    seconds_per_phase: dict[str, float] = field(default_factory=dict)
    seconds_total: float = 0.0
    has_optimizer: bool = True  # whether the shards have the optimizer's states

    def add_seconds(self, timed: dict[str, float]) -> None:
        """Add a timer's `time/<phase>` seconds, except the whole step's, which contains its phases."""
        for key, seconds in timed.items():
            phase = key.removeprefix("time/")
            if phase != "step":
                self.seconds_per_phase[phase] = self.seconds_per_phase.get(phase, 0.0) + seconds


class Saving:
    """A checkpoint that is being saved: this rank's shards are written, and are brought into the storage in
    the background. Both calls are collective.
    """

    def __init__(
        self,
        state: LoopState,
        saved: Sequence[Saved],
        storage: Folder,
        scratch: Path,
        *,
        fixed: Mapping[str, Any],
        elsewhere: Sequence[str] = (),
        own_disk: Path | None = None,
    ) -> None:
        """
        Args:
            storage: Ray Train's folder of checkpoints.
            scratch: folder used by this start only, on the file system of a local `storage`; files left there
                by workers that died are removed.
            fixed: config values with which alone the checkpoint can be resumed.
            elsewhere: folders outside the checkpoint that belong to it and have their own manifest, as names
                in the run's folder.
            own_disk: such a folder on this node's own disk, to write the shards to first.
        """
        own = _own_folder(own_disk or scratch, state.step)
        for item in saved:
            item.save(own)
        if collectives.rank() == 0:
            (own / STATE_FILE).write_text(json.dumps(asdict(state)))
        self.scratch = scratch
        self.folder = storage.child(checkpoint_name(state.step))
        first = state.first_prompt_batch
        self.metrics = {"step": state.step, "first_prompt_batch": first, "fixed": dict(fixed)}
        about = {"metrics": self.metrics, ELSEWHERE: [PARENT + name for name in elsewhere]}
        self.commit = manifest.Commit(own, self.folder, about, staging=scratch)

    @property
    def is_ready(self) -> bool:
        """Whether `finish` would not wait for this rank's files."""
        return self.commit.is_ready

    def finish(self) -> None:
        """Wait until the checkpoint is complete, and report it to Ray Train."""
        self.commit.finish()
        ray.train.report(
            self.metrics,
            checkpoint=_of_ray(self.folder),
            checkpoint_dir_name=self.folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,  # it is in the storage already
        )
        if collectives.rank() == 0:
            clear(self.scratch)


def _of_ray(folder: Folder) -> Checkpoint:
    if isinstance(folder, RemoteFolder):
        return Checkpoint(folder.path, folder.files)
    return Checkpoint.from_directory(str(folder))


def _own_folder(scratch: Path, step: int) -> Path:
    """Create an empty folder for this rank."""
    of_rank = f"-rank-{collectives.rank():04d}"
    if collectives.rank() == 0:
        clear(scratch)
    collectives.max_over_ranks(0.0)  # barrier: no rank writes before the folder is cleared
    for left in scratch.glob(f"*{of_rank}"):  # on a disk of its node's own, which rank 0 does not see
        shutil.rmtree(left, ignore_errors=True)
    own = scratch / f"{checkpoint_name(step)}{of_rank}"
    own.mkdir(parents=True)
    return own


def restore(saved: Sequence[Saved]) -> LoopState:
    """Load the newest checkpoint into `saved` and return its state; a fresh state if there is none.
    Collective.

    Raises:
        DamagedCheckpoint: if a file is missing or changed, or loading it would run code.
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
    """`first_draw` is the name of `first_prompt_batch` in checkpoints made before November 2026."""
    if "first_draw" in saved:
        saved["first_prompt_batch"] = saved.pop("first_draw")
    return LoopState(**saved)


def _check(folder: Path) -> None:
    """Check the checkpoint again, for damage since the driver's check or since it was saved, and for code
    that loading would run. All ranks raise the same error. Collective.
    """
    from rayrlhf.train.safe_load import unsafe_files  # here, because it imports DeepSpeed: not on the driver

    local = LocalFolder(folder)
    found = manifest.read(local) if collectives.rank() == 0 else None
    why = found and manifest.damage(local, found["files"], full=False)
    [why, *_] = collectives.gather_lists([why])
    if why:
        fix = "Fix: the same command resumes from the newest intact checkpoint"
        raise manifest.DamagedCheckpoint(f"{folder}: {why}. {fix}")
    mine = sorted(folder.rglob("*.pt"))[collectives.rank() :: collectives.world_size()]
    if unsafe := collectives.gather_lists(unsafe_files(mine)):
        raise manifest.DamagedCheckpoint(
            f"{'; '.join(unsafe)}. None of it was run. rayrlhf saves no such file: the checkpoint was "
            "modified. Fix: restore it, delete it to resume from the one before, or choose another run.name"
        )


def clear(folder: Path) -> None:
    """Remove everything in `folder`; targets of symbolic links are kept."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def newest_step(storage: Folder) -> int:
    """The step of the newest committed checkpoint under a Ray Train run's folder; 0 when there is none."""
    return _newest_metrics(storage)["step"]


def newest_first_prompt_batch(storage: Folder) -> int:
    """The prompt batch at which the newest committed checkpoint resumes; 0 when there is none."""
    metrics = _newest_metrics(storage)
    return metrics["first_prompt_batch"] if "first_prompt_batch" in metrics else metrics["first_draw"]


def _newest_metrics(storage: Folder) -> dict[str, Any]:
    """Metrics reported with the newest checkpoint, from Ray Train's own record, which the driver has repaired
    (`train.find`).
    """
    record = storage.read(RECORD)
    newest = json.loads(record).get("latest_checkpoint_result") if record else None
    return newest["metrics"] if newest else {"step": 0, "first_prompt_batch": 0}
