"""Finds the checkpoint to resume from: the newest intact one on disk, regardless of Ray Train's record.

Ray Train resumes from its own record, `checkpoint_manager_snapshot.json`. When that file is damaged, or names
missing folders, it ends the run although checkpoints exist. Here the folders decide, and the record is
rewritten from them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from rayrlhf.storage.folder import Folder
from rayrlhf.train import manifest
from rayrlhf.train.checkpoint import ELSEWHERE, PARENT, RECORD, STATE_FILE

NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Found:
    """An intact checkpoint."""

    step: int
    folder: Folder
    metrics: dict[str, Any]  # as reported with it: step, first_prompt_batch, and perhaps fixed
    has_manifest: bool


@dataclass(frozen=True)
class Search:
    """The checkpoints of a run, checked."""

    whole: list[Found] = field(default_factory=list)  # newest first
    damaged: dict[str, str] = field(default_factory=dict)  # folder name -> what is wrong with it
    record_problem: str | None = None  # what is wrong with Ray Train's record

    @property
    def newest(self) -> Found | None:
        return self.whole[0] if self.whole else None


def search(storage: Folder, *, full: bool = False, say: manifest.Say | None = None) -> Search:
    """Check every checkpoint in Ray Train's folder.

    Args:
        full: also verify the checksum of every file of the newest intact checkpoint.
        say: receives a progress line when the check takes long.
    """
    recorded, problem = _recorded(storage)
    found = Search(record_problem=problem)
    names = set(filter(_step, storage.folders()))
    every: set[str] = names | (recorded or {}).keys()
    for name in sorted(every, key=_step, reverse=True):
        if name not in names:
            found.damaged[name] = f"the folder is gone ({RECORD} names it)"
            continue
        try:
            whole = _check_folder(storage.child(name), recorded, full=full and not found.whole, say=say)
        except ValueError as error:
            found.damaged[name] = str(error)
            continue
        if whole is not None:
            found.whole.append(whole)
    return found


def _step(name: str) -> int:
    match = NAME.fullmatch(name)
    return int(match[1]) if match else 0


def _check_folder(
    folder: Folder, recorded: dict[str, dict[str, Any]] | None, *, full: bool, say: manifest.Say | None
) -> Found | None:
    """None for a checkpoint that was never finished. Raises `ValueError` saying what is damaged."""
    about = manifest.read(folder)
    step = _step(folder.name)
    if about is None:
        if folder.is_remote or (recorded is not None and folder.name not in recorded):
            return None  # its upload was interrupted, or the copy of a version that had Ray Train copy it
        _raise(manifest.damage_without_manifest(Path(str(folder))))
        metrics = _metrics_of_state(folder) | (recorded or {}).get(folder.name, {})
        return Found(step, folder, metrics, has_manifest=False)
    _raise(manifest.damage(folder, about["files"], full=full, say=say))
    for name in about.get(ELSEWHERE, []):
        _check_elsewhere(folder.parent.parent.child(name.removeprefix(PARENT)), full=full, say=say)
    return Found(step, folder, about["metrics"], has_manifest=True)


def _check_elsewhere(folder: Folder, *, full: bool, say: manifest.Say | None) -> None:
    """Check a folder outside the checkpoint that belongs to it. Raises `ValueError`."""
    where = f"{folder.parent.name}/{folder.name}"
    if not folder.exists():
        raise ValueError(f"{where}, which belongs to it, is gone")
    about = manifest.read(folder)
    if about is None:
        raise ValueError(f"{where}, which belongs to it, has no {manifest.MANIFEST}")
    problem = manifest.damage(folder, about["files"], full=full, say=say)
    _raise(problem and f"{where}: {problem}")


def _raise(problem: str | None) -> None:
    if problem:
        raise ValueError(problem)


def _metrics_of_state(folder: Folder) -> dict[str, Any]:
    try:
        state = json.loads(folder.read(STATE_FILE) or "")
        first = state.get("first_prompt_batch", state.get("first_draw", 0))
        return {"step": state["step"], "first_prompt_batch": first}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{STATE_FILE} cannot be read ({error!r})") from error


def _recorded(storage: Folder) -> tuple[dict[str, dict[str, Any]] | None, str | None]:
    """The metrics of the checkpoints in Ray Train's record, by folder name; or None and what is wrong."""
    try:
        text = storage.read(RECORD)
        if text is None:
            return None, f"{RECORD} is missing" if any(map(_step, storage.folders())) else None
        record = json.loads(text)
        results = [*record["checkpoint_results"]]
        if record["latest_checkpoint_result"] is not None:
            results.append(record["latest_checkpoint_result"])
        return {str(result["checkpoint_dir_name"]): {**result["metrics"]} for result in results}, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{RECORD} cannot be read ({error!r})"


def write_record(storage: Folder, found: Search) -> None:
    """Rewrite Ray Train's record from the intact checkpoints if it differs. When more than `checkpoint.keep`
    are recorded, Ray Train removes the oldest at its next save.
    """
    names = [checkpoint.folder.name for checkpoint in reversed(found.whole)]
    recorded, problem = _recorded(storage)
    if problem is None and list(recorded or {}) == names and (not names or _is_of_this_ray(storage)):
        return
    if not names:
        storage.remove(RECORD)
        return
    results = [
        {"version": 0, "checkpoint_dir_name": checkpoint.folder.name, "metrics": checkpoint.metrics}
        for checkpoint in reversed(found.whole)
    ]
    record = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    storage.write(RECORD, json.dumps(record))


def _is_of_this_ray(storage: Folder) -> bool:
    """Whether the installed Ray wrote the record: Ray Train refuses another version's."""
    return json.loads(storage.read(RECORD) or "{}").get("ray_version") == ray.__version__
