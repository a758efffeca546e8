"""Default learning rates of jobs are their own, not those of policy runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.chains import IterativeDpoConfig, RejectionSamplingConfig
from rayrlhf.config.job_kinds import load_any
from rayrlhf.config.parse import dump_resolved
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import JOBS

TREE: dict[str, Any] = {"run": {"name": "x"}, "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}
REWARD = {"reward": {"sources": [{"type": "function", "function": "a:b"}]}}


def config_of(job: str, **changes: Any) -> Any:
    tree = {**TREE, **changes}
    tree["data"] = {**tree["data"], **({"step_token": "+"} if job == "prm" else {})}
    if job == "kd":
        tree["teacher"] = {"path": "t"}
    return JOBS[job].model_validate(tree)


@pytest.mark.parametrize(
    ("job", "lr"), [("sft", 1e-5), ("kd", 1e-5), ("rm", 9e-6), ("prm", 9e-6), ("dpo", 5e-7), ("kto", 5e-7)]
)
def test_each_job_has_its_own(job: str, lr: float) -> None:
    """All had 1e-6 and a constant rate, which are those of policy gradients."""
    train = config_of(job).train
    assert (train.lr, train.lr_schedule, train.warmup_ratio) == (lr, "cosine", 0.03)
    assert train.with_steps(6400).warmup_steps == 3  # of 100 steps of 64
    assert config_of(job, model={"path": "m", "lora": {}}).train.lr == pytest.approx(10 * lr)


def test_policies_keep_theirs() -> None:
    tree = {**TREE, **REWARD, "train": {"num_steps": 1}}
    train = PolicyRunConfig.model_validate(tree).train
    assert (train.lr, train.lr_schedule, train.warmup_steps) == (1e-6, "constant", 0)
    with_lora = PolicyRunConfig.model_validate({**tree, "model": {"path": "m", "lora": {}}})
    assert with_lora.train.lr == 1e-5


def test_what_is_given_stays() -> None:
    given = {"lr": 3e-4, "lr_schedule": "linear", "warmup_steps": 7}
    train = config_of("sft", train=given, model={"path": "m", "lora": {}}).train
    assert (train.lr, train.lr_schedule, train.warmup_steps, train.warmup_ratio) == (3e-4, "linear", 7, 0.0)
    assert config_of("sft", train={"warmup_ratio": 0.0}).train.warmup_ratio == 0.0
    with pytest.raises(ValueError, match="one of the two"):
        config_of("sft", train={"warmup_ratio": 0.1, "warmup_steps": 7})


@pytest.mark.parametrize("train", [{}, {"warmup_steps": 5}, {"lr": 1e-4}])
def test_the_resolved_form_loads_to_the_same(train: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("sft", train=train, model={"path": "m", "lora": {}})
    (tmp_path / "resolved.yaml").write_text(dump_resolved(config))
    assert load_any([str(tmp_path / "resolved.yaml")]) == config


def test_stages_of_chains_have_those_of_their_jobs() -> None:
    tree = {**TREE, **REWARD, "rollout": {"group_size": 2}, "model": {"path": "m", "lora": {}}}
    sft = RejectionSamplingConfig.model_validate(tree).training_config(1, "m")
    dpo = IterativeDpoConfig.model_validate(tree).training_config(1, "m")
    assert (sft.train.lr, dpo.train.lr) == pytest.approx((1e-4, 5e-6))
    assert sft.train.lr_schedule == dpo.train.lr_schedule == "cosine"
