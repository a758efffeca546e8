"""Which step a run's folder says to resume from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray.train

from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train.checkpoint import (
    LoopState,
    checkpoint_name,
    newest_first_prompt_batch,
    newest_step,
    restore,
)
from tests.train.checkpoints import leave_checkpoint


def snapshot(folder: Path, **fields: Any) -> None:
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(fields))


def result(step: int) -> dict[str, Any]:
    return {"version": 0, "checkpoint_dir_name": checkpoint_name(step), "metrics": {"step": step}}


def test_the_newest_committed_step(tmp_path: Path) -> None:
    snapshot(tmp_path, checkpoint_results=[result(8), result(12)], latest_checkpoint_result=result(12))
    assert newest_step(LocalFolder(tmp_path)) == 12


@pytest.mark.parametrize("fields", [{"checkpoint_results": []}, {"latest_checkpoint_result": None}])
def test_a_run_that_has_saved_nothing_yet(fields: dict[str, Any], tmp_path: Path) -> None:
    snapshot(tmp_path, **fields)
    assert newest_step(LocalFolder(tmp_path)) == 0


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert newest_step(LocalFolder(tmp_path)) == 0
    assert newest_step(LocalFolder(tmp_path / "missing")) == 0


def test_ray_still_writes_what_is_read(tmp_path: Path) -> None:
    """The snapshot is Ray Train's own: when this fails, newest_step must learn the new form."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    latest = _TrainingResultState(checkpoint_dir_name=checkpoint_name(5), metrics={"step": 5})
    state = _CheckpointManagerState(
        checkpoint_results=[latest],
        checkpoint_report_indices=[0],
        latest_checkpoint_result=latest,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=1,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    (tmp_path / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text(state.json())
    assert newest_step(LocalFolder(tmp_path)) == 5


def test_names_sort_by_step() -> None:
    assert checkpoint_name(7) == "step_000007"
    names = [checkpoint_name(step) for step in (2, 10, 999, 100_000)]
    assert names == sorted(names)


def test_the_state_survives_json() -> None:
    state = LoopState(
        step=3,
        first_prompt_batch=7,
        kl_controller={"coef": 0.05},
        eval_before={"metrics": {"eval/reward_mean": 0.5}, "rows": [{"prompt": "é"}]},
        seconds_per_phase={"rollout": 1.5},
        seconds_total=9.25,
    )
    assert LoopState(**json.loads(json.dumps(asdict(state)))) == state
    assert LoopState().step == 0, "a fresh run starts at the first step"


@pytest.mark.parametrize("first", ["first_prompt_batch", "first_draw"])
def test_a_run_goes_on_from_checkpoints_of_both_versions(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before November 2026 the first prompt batch was saved as `first_draw`."""
    folder = leave_checkpoint(tmp_path / "checkpoints", 5, first=first)
    assert first in json.loads((folder / "state.json").read_text())
    checkpoint = ray.train.Checkpoint.from_directory(str(folder))
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: checkpoint)
    assert restore([]) == LoopState(step=5, first_prompt_batch=5)
    assert newest_first_prompt_batch(LocalFolder(tmp_path / "checkpoints")) == 5
