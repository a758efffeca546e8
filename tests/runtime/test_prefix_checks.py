"""Which jobs share prefixes, and what is said where one cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, Lfm2Config, MixtralConfig, Phi3Config

from rayrlhf.config.supervised import JOBS
from rayrlhf.runtime.prefix_checks import with_prefixes_shared
from tests.integration.policy_runs import tiny_run
from tests.tiny_vision import make_tiny_vision


def shares(config: Any) -> tuple[bool, str]:
    said: list[str] = []
    found = with_prefixes_shared(config, said.append)
    return found.train.share_prefixes, " ".join(said)


def job(name: str, path: str, **sections: Any) -> Any:
    tree = {"run": {"name": "x"}, "model": {"path": path}, "data": {"train": "none.jsonl"}}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return JOBS[name].model_validate(tree)


def test_models_of_attention_layers_share(tiny_model: str, tmp_path: Path) -> None:
    assert shares(tiny_run(tmp_path, tiny_model)) == (True, "")
    assert shares(job("dpo", tiny_model)) == (True, "")
    assert shares(job("rm", tiny_model)) == (True, "")
    assert shares(job("sft", tiny_model)) == (True, ""), "it has no dropout"
    assert shares(job("rm", tiny_model, train={"share_prefixes": False})) == (False, "")


def test_mixtures_of_experts_share(tmp_path: Path) -> None:
    MixtralConfig(num_local_experts=4, num_hidden_layers=2).save_pretrained(tmp_path)
    assert shares(job("sft", str(tmp_path), model={"aux_loss_coef": 0.01})) == (True, "")


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"sequence_parallel": 2}, "train": {"num_workers": 2}}, "model.sequence_parallel"),
        ({"model": {"lora": {"dropout": 0.1}}}, "with model.lora.dropout"),
    ],
)
def test_settings_without_it(tiny_model: str, sections: dict[str, Any], reason: str) -> None:
    is_on, said = shares(job("dpo", tiny_model, **sections))
    assert not is_on and said.startswith("train.share_prefixes=false: ") and reason in said


def test_jobs_and_models_without_it(tiny_model: str, tmp_path: Path) -> None:
    assert "distillation" in shares(job("kd", tiny_model, teacher={"path": tiny_model}))[1]
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    gpt2 = str(tmp_path / "gpt2")
    assert "with train.dropout" in shares(job("sft", gpt2))[1]
    assert shares(job("sft", gpt2, train={"dropout": False})) == (True, "")
    assert shares(job("dpo", gpt2)) == (True, ""), "the dropout of a policy's config.json is off"
    Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2).save_pretrained(tmp_path / "lfm2")
    is_on, said = shares(job("dpo", str(tmp_path / "lfm2")))
    assert not is_on and "model.path: a lfm2 has layers that need each sequence in full" in said


def test_the_critic_and_the_reference_have_to_share_too(tiny_model: str, tmp_path: Path) -> None:
    Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2).save_pretrained(tmp_path / "lfm2")
    hybrid = str(tmp_path / "lfm2")
    for section in ("critic", "ref"):
        is_on, said = shares(tiny_run(tmp_path, tiny_model, **{section: {"path": hybrid}}))
        assert not is_on and f"{section}.path: a lfm2" in said


def test_rotary_frequencies_that_depend_on_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )
    config.save_pretrained(tmp_path)
    assert not shares(job("dpo", str(tmp_path)))[0]


def test_images(tmp_path: Path) -> None:
    is_on, said = shares(job("dpo", make_tiny_vision(tmp_path / "model")))
    assert not is_on and "depend on its images" in said
