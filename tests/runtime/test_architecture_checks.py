"""A job's models are judged before Ray starts, and a plan shows what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig, Lfm2Config, LlamaConfig, MambaConfig, MixtralConfig, PhimoeConfig

from rayrlhf.commands.plan_with_verdicts import main as plan
from rayrlhf.config.base import ConfigError
from rayrlhf.config.chains import CHAINS
from rayrlhf.config.supervised import JOBS
from rayrlhf.runtime.architecture_checks import check_architectures, longest_sequence
from tests.config.test_chains import chain
from tests.integration.policy_runs import tiny_run


@pytest.fixture
def hybrid(tmp_path: Path) -> str:
    folder = tmp_path / "hybrid"
    Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2).save_pretrained(folder)
    return str(folder)


def sft(path: str, **sections: Any) -> Any:
    tree = {"run": {"name": "x"}, "model": {"path": path}, "data": {"train": "none.jsonl"}}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return JOBS["sft"].model_validate(tree)


def test_5_a_packed_model_is_not_worth_a_line(tiny_model: str) -> None:
    said: list[str] = []
    check_architectures(sft(tiny_model), said.append)
    assert said == []


def test_5_a_slower_way_is_said(hybrid: str) -> None:
    said: list[str] = []
    check_architectures(sft(hybrid), said.append)
    assert len(said) == 1 and said[0].startswith(
        "model.path: lfm2 is supported one sequence per stream: its "
    )
    assert said[0].endswith("right, but slower)")


def test_5_every_refused_model_is_named(tiny_model: str, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    bert = str(tmp_path / "bert")
    config = tiny_run(tmp_path, tiny_model, critic={"path": bert}, ref={"path": bert})
    with pytest.raises(ConfigError) as caught:
        check_architectures(config, print)
    message = str(caught.value)
    assert "critic.path" in message and "ref.path" in message and "model.path" not in message
    assert "bidirectional" in message and "choose another model" in message


@pytest.mark.parametrize("schema", CHAINS.values())
def test_5_a_chain_is_refused_before_its_first_round(schema: Any, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"model\.path[\s\S]*bidirectional"):
        check_architectures(chain(schema, model={"path": str(tmp_path / "bert")}), print)


def test_5_an_engine_that_rotates_otherwise_than_the_trainer_is_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = LlamaConfig(**shape, max_position_embeddings=128, rope_parameters=rope)
    model.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    check_architectures(tiny_run(tmp_path, path, data={"max_prompt_tokens": 52}), print)  # and 12 new ones
    with pytest.raises(ConfigError, match=r"up to 65 tokens[\s\S]*64 tokens together at most"):
        check_architectures(tiny_run(tmp_path, path, data={"max_prompt_tokens": 53}), print)
    check_architectures(sft(path, data={"max_tokens": 100}), lambda _: None)  # no engine


def test_5_ranks_cannot_share_the_sequences_of_a_hybrid(hybrid: str, tiny_model: str) -> None:
    shared = {"train": {"num_workers": 2}}
    check_architectures(sft(tiny_model, model={"sequence_parallel": 2}, **shared), print)
    with pytest.raises(
        ConfigError, match=r"model\.sequence_parallel[\s\S]*lfm2[\s\S]*sequence_parallel to 1"
    ):
        check_architectures(sft(hybrid, model={"sequence_parallel": 2}, **shared), print)


def test_5_the_longest_sequence_is_that_of_the_data(tiny_model: str, tmp_path: Path) -> None:
    assert longest_sequence(sft(tiny_model, data={"max_tokens": 777})) == 777
    config = tiny_run(tmp_path, tiny_model)
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    assert longest_sequence(config) == prompt + response


def test_5_a_plan_has_the_verdict(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sft.yaml"
    tree = {"job": "sft", "run": {"name": "x"}, "model": {"path": tiny_model}, "data": {"train": "x.jsonl"}}
    file.write_text(yaml.safe_dump(tree))
    assert plan([str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.path: llama is supported packed (largest difference measured" in shown
    assert plan([str(file), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out).values()
    assert stage["architectures"][0].startswith("model.path: llama is supported packed")


def test_a_plan_says_how_adapters_reach_the_engines(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path, tiny_model, model={"lora": {"rank": 4}})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    for words, said in (
        ([], "LoRA adapters reach the engines alone"),
        (["rollout.weight_sync.lora=merged"], "LoRA adapters are merged into all weights of a push"),
    ):
        assert plan([str(file), *words]) == 0
        assert said in " ".join(capsys.readouterr().out.split())


def test_5_a_plan_has_the_verdict_where_nothing_is_known_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MambaConfig().save_pretrained(tmp_path)
    file = tmp_path / "sft.yaml"
    tree = {
        "job": "sft",
        "run": {"name": "x"},
        "model": {"path": str(tmp_path)},
        "data": {"train": "x.jsonl"},
    }
    file.write_text(yaml.safe_dump(tree))
    assert plan([str(file)]) == 2
    shown = capsys.readouterr()
    assert "mamba is supported one sequence per stream" in " ".join(shown.out.split())
    assert "unknown model_type 'mamba'" in shown.err


def test_5_a_plan_says_what_it_could_not_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sft.yaml"
    tree = {
        "job": "sft",
        "run": {"name": "x"},
        "model": {"path": "Qwen/Qwen2.5-7B"},
        "data": {"train": "x.jsonl"},
    }
    file.write_text(yaml.safe_dump(tree))
    assert plan([str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.path=Qwen/Qwen2.5-7B: no config.json on this machine" in shown


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (LlamaConfig, "it has no mixture-of-experts layers"),
        (PhimoeConfig, "neither by softmax nor by sigmoid"),
    ],
)
def test_a_balance_loss_needs_routers_that_are_understood(other: Any, why: str, tmp_path: Path) -> None:
    MixtralConfig().save_pretrained(tmp_path / "mixtral")
    other().save_pretrained(tmp_path / "other")
    coef = {"aux_loss_coef": 0.001}
    check_architectures(sft(str(tmp_path / "mixtral"), model=coef), print)
    with pytest.raises(ConfigError, match=rf"model.aux_loss_coef\s+got: +0.001 with a .*{why}"):
        check_architectures(sft(str(tmp_path / "other"), model=coef), print)
