"""What a run can resume from and compute with, reported before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import SftRunConfig
from rayrlhf.runtime.preflight import InputError, check_kernels, check_precision
from rayrlhf.runtime.resume import FIXED, check_resume, check_unchanged, fixed_values, select_checkpoint
from rayrlhf.train import manifest
from rayrlhf.train.checkpoint import RECORD
from tests.integration.policy_runs import tiny_run
from tests.train import checkpoints
from tests.train.checkpoints import cut


def leave_checkpoint(run: Path, **fixed: object) -> Path:
    return checkpoints.leave_checkpoint(run / "checkpoints", 4, fixed)


def test_the_number_of_workers_may_change_and_how_states_are_divided_may_not(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model", train={"zero_stage": 2, "num_workers": 2})
    values = fixed_values(config)
    assert {key: values[key] for key in values if FIXED[key] is None} == {
        "train.zero_stage": 2,
        "model.dtype": config.model.dtype,
        "rollout.prompts_per_step": config.rollout.prompts_per_step,
    }
    check_resume(config)  # nothing to resume
    leave_checkpoint(Path(config.run.path), **fixed_values(config))
    check_resume(config)
    check_resume(tiny_run(tmp_path, "model", train={"zero_stage": 2, "num_workers": 1}))
    other = tiny_run(tmp_path, "model", train={"zero_stage": 3, "num_workers": 2})
    with pytest.raises(InputError, match=r"step 4 (.|\n)*train\.zero_stage: was 2, is 3\. Fix: restore"):
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
    with pytest.raises(InputError, match=r"model\.lora\.rank: was 8, is 4"):
        check_resume(run(rank=4))
    with pytest.raises(InputError, match=r"model\.lora\.target_modules: was null, is \[\"q_proj\"\]"):
        check_resume(run(rank=8, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"model\.lora\.rank: was 8, is null"):
        check_resume(run())


def test_frozen_weights_keep_their_bits(tmp_path: Path) -> None:
    def run(**model: object) -> PolicyRunConfig:
        return tiny_run(tmp_path, "model", model={"lora": {"rank": 8}, **model})

    config = run(quantization="nf4")
    leave_checkpoint(Path(config.run.path), **fixed_values(config))
    check_resume(config)
    with pytest.raises(InputError, match=r"model\.quantization: was \"nf4\", is null"):
        check_resume(run())


def test_a_checkpoint_of_an_earlier_version_is_reported_as_such(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model")
    folder = leave_checkpoint(Path(config.run.path))
    (folder / manifest.MANIFEST).unlink()
    (folder / "actor" / "layout.json").unlink()
    record = folder.parent / RECORD
    record.write_text(record.read_text().replace(', "fixed": {}', ""))
    with pytest.raises(InputError, match=r"step 4 .* saved by an earlier version"):
        check_resume(config)


def left_by(config: Any, *, step: int = 4, data: str = "aaaa") -> Path:
    """A checkpoint as a run of this config leaves it."""
    fixed = fixed_values(config, {"data.train": data})
    return checkpoints.leave_checkpoint(Path(config.run.path) / "checkpoints", step, fixed)


def resumed(config: Any, *, data: str = "aaaa") -> list[str]:
    """What a resume says, up to where the trainers would be placed."""
    said: list[str] = []
    check_resume(config)
    newest = select_checkpoint(config, said.append)
    check_unchanged(config, newest, {"data.train": data}, said.append)
    return said


def sft(folder: Path, **changes: Any) -> SftRunConfig:
    base: dict[str, Any] = {
        "job": "sft",
        "run": {"name": "sft", "dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {"train": "train.jsonl"},
    }
    return SftRunConfig.model_validate(base | {key: base.get(key, {}) | new for key, new in changes.items()})


def write_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_35_other_data_are_refused_or_allowed_by_name(tmp_path: Path) -> None:
    """Before, the run went on in the middle of other rows without a word."""
    write_model(tmp_path / "model", b"weights")
    left_by(sft(tmp_path))
    assert resumed(sft(tmp_path)) == []
    refusal = (
        r"data\.train: was train\.jsonl \(contents aaaa\), is other\.jsonl \(contents bbbb\)\. "
        r"Fix: restore data\.train, set run\.allow_changes=\[data\] to resume nevertheless, or choose"
    )
    with pytest.raises(InputError, match=refusal):
        resumed(sft(tmp_path, data={"train": "other.jsonl"}), data="bbbb")
    with pytest.raises(InputError, match=r"data\.train"):  # a file of the same name with other rows
        resumed(sft(tmp_path, run={"allow_changes": ["batch"]}), data="bbbb")
    assert resumed(sft(tmp_path, data={"train": "renamed.jsonl"})) == []
    [said] = resumed(sft(tmp_path, run={"allow_changes": ["data"]}), data="bbbb")
    assert said.startswith("changed since step 4: data.train: was train.jsonl (contents aaaa), is")


def test_35_another_batch_is_refused_or_allowed_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "model", b"weights")
    left_by(sft(tmp_path, train={"samples_per_step": 16}))
    other: dict[str, Any] = {"train": {"samples_per_step": 32}}
    with pytest.raises(InputError, match=r"train\.samples_per_step: was 16, is 32\. Fix: .*\[batch\]"):
        resumed(sft(tmp_path, **other))
    [said] = resumed(sft(tmp_path, **other, run={"allow_changes": ["batch"]}))
    assert said == "changed since step 4: train.samples_per_step: was 16, is 32"


def test_what_the_order_of_the_rows_depends_on_is_compared(tmp_path: Path) -> None:
    write_model(tmp_path / "model", b"weights")
    size = {"tokens_per_step": 65536, "max_tokens_per_micro_batch": 8192}
    left_by(sft(tmp_path, train=size))
    assert resumed(sft(tmp_path, train={**size, "num_workers": 2})) == []  # its rows are the same
    for other, was in (
        ({"tokens_per_step": 32768}, r"train\.tokens_per_step: was 65536, is 32768"),
        ({"max_tokens_per_micro_batch": 4096}, r"train\.max_tokens_per_micro_batch: was 8192, is 4096"),
    ):
        with pytest.raises(InputError, match=was):
            resumed(sft(tmp_path, train=size | other))


def test_micro_batches_and_workers_matter_only_where_rows_are_chosen_by_them(tmp_path: Path) -> None:
    write_model(tmp_path / "model", b"weights")
    left_by(sft(tmp_path))
    other = {"max_tokens_per_micro_batch": 4096, "num_workers": 2}
    assert resumed(sft(tmp_path, train=other)) == []
    with pytest.raises(InputError, match=r"(?s)fill_micro_batches: was null, is true.*num_workers"):
        resumed(sft(tmp_path, train={**other, "fill_micro_batches": True}))


def test_35_another_model_is_refused_or_allowed_by_name(tmp_path: Path) -> None:
    """Its contents count, not its name."""
    model = write_model(tmp_path / "model", b"weights" * 1_000_000)
    left_by(sft(tmp_path))
    other = str(write_model(tmp_path / "other", b"WEIGHTS" * 1_000_000))
    with pytest.raises(InputError, match=r"model\.path: was \S+model \(contents \w+\), is \S+other \("):
        resumed(sft(tmp_path, model={"path": other}))
    [said] = resumed(sft(tmp_path, model={"path": other}, run={"allow_changes": ["model"]}))
    assert "model.path" in said
    moved = model.rename(tmp_path / "moved")
    assert resumed(sft(tmp_path, model={"path": str(moved)})) == []


def test_35_seed_reward_and_job_belong_to_a_run(tmp_path: Path) -> None:
    left_by(tiny_run(tmp_path, "model"))
    with pytest.raises(InputError, match=r"run\.seed: was 0, is 7"):
        resumed(tiny_run(tmp_path, "model", run={"seed": 7}))
    source = {"type": "function", "function": "tests.integration.policy_runs:another"}
    with pytest.raises(InputError, match=r"reward\.sources: was .*share_of_vowels.*, is .*another"):
        resumed(tiny_run(tmp_path, "model", reward={"sources": [source]}))
    with pytest.raises(InputError) as refused:
        resumed(tiny_run(tmp_path, "model", rollout={"prompts_per_step": 16, "group_size": 2}))
    lines = str(refused.value).splitlines()
    assert any("rollout.prompts_per_step: was 32, is 16. Fix: restore" in line for line in lines)
    assert not any("prompts_per_step" in line and "allow_changes" in line for line in lines)
    assert any("rollout.group_size" in line and "allow_changes=[batch]" in line for line in lines)


def test_35_what_may_change_freely(tmp_path: Path) -> None:
    left_by(tiny_run(tmp_path, "model"))
    changes: dict[str, Any] = {
        "train": {"lr": 1e-5, "num_steps": 50, "num_workers": 2, "max_tokens_per_micro_batch": 512},
        "checkpoint": {"every_steps": 3, "keep": 7},
        "eval": {"samples_per_prompt": 2},
        "algorithm": {"kl_coef": 0.1},
        "rollout": {"num_engines": 2},
        "observe": {"tensorboard": False},
    }
    assert resumed(tiny_run(tmp_path, "model", **changes)) == []


def test_29_the_damaged_one_is_named_and_the_one_before_taken(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model")
    for step in (2, 4):
        folder = left_by(config, step=step)
    cut(folder / "state.json", 3)
    said = resumed(config)
    assert said[0].startswith("warning: checkpoint step_000004 is damaged: state.json has 3 bytes of ")
    assert said[1:] == ["resuming from step 2, the newest intact checkpoint"]
    assert resumed(config) == said, "until its place is taken"
    left_by(config, step=6)
    assert resumed(config) == [] and not folder.exists()


def test_29_without_a_whole_one_a_run_does_not_begin_again_silently(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model")
    for step in (2, 4):
        cut(left_by(config, step=step) / "actor" / "layout.json", 1)
    for resume in ("auto", "never"):
        config = tiny_run(tmp_path, "model", run={"resume": resume})
        wanted = r"no checkpoint in \S+ is intact:\n  step_000004: actor/layout.json has 1 bytes of \d+\n"
        if resume == "never":
            wanted = r"run\.resume=never but \S+ holds damaged checkpoints"
        with pytest.raises(InputError, match=wanted):
            check_resume(config)


def test_29_a_damaged_record_is_said_and_made_again(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model")
    (left_by(config).parent / RECORD).write_text("null")
    first, second = resumed(config)
    assert first.startswith(f"warning: Ray Train's {RECORD} cannot be read (TypeError")
    assert second == "resuming from step 4, the newest intact checkpoint"
    assert resumed(config) == []


def test_checkpoints_without_checksums_are_taken_with_a_warning(tmp_path: Path) -> None:
    """Of a version that kept fewer keys: what it did not keep cannot be compared."""
    config = tiny_run(tmp_path, "model")
    kept = {"train.zero_stage": config.train.zero_stage, "model.dtype": "auto"}
    folder = leave_checkpoint(Path(config.run.path), **kept, **{"rollout.prompts_per_step": 32})
    (folder / manifest.MANIFEST).unlink()
    assert resumed(config) == [
        "warning: checkpoint step_000004 has no checksums: its contents cannot be checked"
    ]
    with pytest.raises(InputError, match=r"rollout\.prompts_per_step: was 32, is 16"):
        resumed(tiny_run(tmp_path, "model", rollout={"prompts_per_step": 16}))


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


def test_a_machine_that_cannot_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, "model", model={"compile": True})
    check_kernels(config, on_gpu=False)
    monkeypatch.setattr("rayrlhf.models.compiled_layers._cpp_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"(?s)model\.compile.*does not have a C\+\+ compiler"):
        check_kernels(config, on_gpu=False)
    check_kernels(config, on_gpu=True)  # by the workers
    check_kernels(tiny_run(tmp_path, "model"), on_gpu=False)


def test_kernels_for_gpus_are_refused_on_cpus(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "model", model={"kernels": "liger"})
    with pytest.raises(ConfigError, match=r"(?s)model\.kernels.*liger on CPUs"):
        check_kernels(config, on_gpu=False)
    check_kernels(config, on_gpu=True)
