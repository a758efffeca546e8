"""What a run can go on from, told before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.loops.checks import InputError, check_resume, fixed_values
from tests.integration.policy_runs import tiny_run


def leave_checkpoint(run: Path, **fixed: object) -> None:
    (run / "checkpoints").mkdir(parents=True)
    metrics = {"step": 4, "first_draw": 4, "fixed": fixed}
    snapshot = {"latest_checkpoint_result": {"metrics": metrics}}
    (run / "checkpoints" / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))


def test_the_number_of_workers_may_change_and_how_states_are_divided_may_not(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model", train={"zero_stage": 2, "num_workers": 2})
    assert fixed_values(config) == {
        "train.zero_stage": 2,
        "model.dtype": config.model.dtype,
        "rollout.prompts_per_step": config.rollout.prompts_per_step,
    }
    check_resume(config)  # nothing to resume
    leave_checkpoint(Path(config.run.path), **fixed_values(config))
    check_resume(config)
    check_resume(tiny_run(tmp_path, "model", train={"zero_stage": 2, "num_workers": 1}))
    other = tiny_run(tmp_path, "model", train={"zero_stage": 3, "num_workers": 2})
    with pytest.raises(InputError, match=r"train\.zero_stage: got 3, wanted 2, .* step 4 .* Fix: "):
        check_resume(other)
    never = tiny_run(tmp_path, "model", run={"resume": "never"}, train={"zero_stage": 2})
    with pytest.raises(InputError, match=r"run\.resume=never but .* holds a checkpoint of step 4"):
        check_resume(never)
