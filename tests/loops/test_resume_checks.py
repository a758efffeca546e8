"""What a run can go on from and compute with, told before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.loops.checks import InputError, check_precision, check_resume, fixed_values
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


def test_adapters_go_on_as_they_were(tmp_path: Path) -> None:
    def run(**lora: object) -> PolicyRunConfig:
        return tiny_run(tmp_path, "model", model={"lora": lora} if lora else {})

    config = run(rank=8)
    leave_checkpoint(Path(config.run.path), **fixed_values(config))
    check_resume(config)
    with pytest.raises(InputError, match=r"model\.lora\.rank: got 4, wanted 8"):
        check_resume(run(rank=4))
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: got \['q_proj'\], wanted null"):
        check_resume(run(rank=8, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"model\.lora\.rank: got null, wanted 8"):
        check_resume(run())


def test_frozen_weights_keep_their_bits(tmp_path: Path) -> None:
    def run(**model: object) -> PolicyRunConfig:
        return tiny_run(tmp_path, "model", model={"lora": {"rank": 8}, **model})

    config = run(quantization="nf4")
    leave_checkpoint(Path(config.run.path), **fixed_values(config))
    check_resume(config)
    with pytest.raises(InputError, match=r"model\.quantization: got null, wanted nf4"):
        check_resume(run())


def test_a_checkpoint_of_an_earlier_version_is_told_as_such(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model")
    leave_checkpoint(Path(config.run.path))
    snapshot = Path(config.run.path) / "checkpoints" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text().replace(', "fixed": {}', ""))
    with pytest.raises(InputError, match=r"step 4 .* saved by an earlier version"):
        check_resume(config)


@pytest.mark.parametrize(
    "dtype, train, on_gpu, refused",
    [
        ("auto", {"zero_stage": 0}, False, None),
        ("auto", {"zero_stage": 1}, True, None),
        ("auto", {"zero_stage": 0}, True, "0 with model.dtype=auto on GPUs"),
        ("bfloat16", {"zero_stage": 0}, False, "0 with model.dtype=bfloat16"),
        ("bfloat16", {"zero_stage": 2, "master_weights": "bfloat16"}, False, None),
        ("auto", {"zero_stage": 2, "master_weights": "bfloat16"}, False, "model.dtype=auto on CPUs"),
    ],
)
def test_precisions_that_do_not_go_together(
    dtype: str, train: dict[str, object], on_gpu: bool, refused: str | None, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path, "model", model={"dtype": dtype}, train=train)
    if refused is None:
        check_precision(config, on_gpu=on_gpu)
        return
    with pytest.raises(ConfigError, match=refused):
        check_precision(config, on_gpu=on_gpu)
