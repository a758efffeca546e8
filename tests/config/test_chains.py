"""Configs of batch inference and of chains: what a stage gets, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.chains import ConditionalSftConfig, IterativeDpoConfig, RejectionSamplingConfig
from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.config.parse import load_config
from rayrlhf.config.supervised import DpoRunConfig, SftRunConfig
from rayrlhf.config.yaml_tree import write_tree

C = TypeVar(
    "C", bound=GenerateRunConfig | RejectionSamplingConfig | IterativeDpoConfig | ConditionalSftConfig
)
FUNCTION = {"type": "function", "function": "rewards:length"}


def tree_of(schema: type[Any], **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run": {"name": "chain", "dir": "runs"},
        "model": {"path": "models/tiny"},
        "data": {"train": "prompts.jsonl"},
        "rollout": {} if schema is GenerateRunConfig else {"group_size": 2},
        "reward": {"sources": [FUNCTION]},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in base.items() if value is not None}


def chain(schema: type[C], **changes: Any) -> C:
    return schema.model_validate(tree_of(schema, **changes))


def problem(tmp_path: Path, schema: type[Any], **changes: Any) -> Problem:
    """The only thing that is wrong."""
    file = tmp_path / "c.yaml"
    file.write_text(write_tree(tree_of(schema, **changes)))
    with pytest.raises(ConfigError) as caught:
        load_config(schema, [str(file)])
    [found] = caught.value.problems
    return found


def test_the_reference_is_the_policy_that_the_round_starts_from() -> None:
    config = chain(IterativeDpoConfig, run={"seed": 3}, dpo={"precompute_ref": True})
    second = config.training_config(2, "runs/chain/1-dpo/export")
    assert isinstance(second, DpoRunConfig) and second.ref is not None
    assert second.model.path == second.ref.path == "runs/chain/1-dpo/export" and second.ref.precompute
    assert second.data.train[0].path == "jsonl@runs/chain/2-choose/chosen.jsonl"
    assert second.run.path == "runs/chain/2-dpo" and second.run.seed == 3002


def test_the_reference_may_be_the_initial_model() -> None:
    config = chain(IterativeDpoConfig, dpo={"reference": "start"})
    second = config.training_config(2, "export")
    assert isinstance(second, DpoRunConfig) and second.ref is not None
    assert (second.model.path, second.ref.path) == ("export", "models/tiny")


def test_a_loss_without_a_reference_gets_none(tmp_path: Path) -> None:
    simpo = {"algorithm": {"loss": "simpo"}}
    config = chain(IterativeDpoConfig, dpo=simpo)
    first = config.training_config(1, "m")
    assert isinstance(first, DpoRunConfig) and first.ref is None
    found = problem(tmp_path, IterativeDpoConfig, dpo={**simpo, "reference": "start"})
    assert found.path == "dpo.reference"


def test_a_stage_reads_prompts_as_they_were_asked() -> None:
    config = chain(
        ConditionalSftConfig,
        data={"prompt_key": "question", "apply_chat_template": False, "input_template": "Q: {} A:"},
        sft={"reward_template": "{} "},
        rollout={"group_size": 4},
    )
    stage = config.training_config(1, "m")
    assert isinstance(stage, SftRunConfig)
    assert (stage.data.prompt_key, stage.data.input_template) == ("question", "Q: {} A:")
    assert (stage.data.reward_key, stage.data.reward_template) == ("reward", "{} ")
    asked = config.generate_config(1, "m")
    assert asked.rollout.group_size == 4 and asked.data == config.data


def test_each_round_has_its_own_prompts() -> None:
    config = chain(RejectionSamplingConfig, generate={"prompts_per_round": 100})
    rows = [config.generate_config(round_, "m").generate for round_ in (1, 2, 3)]
    assert [(section.first_row, section.num_rows) for section in rows] == [(0, 100), (100, 100), (200, 100)]
    everything = chain(RejectionSamplingConfig).generate_config(3, "m").generate
    assert (everything.first_row, everything.num_rows) == (0, None)


def test_problems_of_a_stage_name_the_keys_of_the_chain(tmp_path: Path) -> None:
    found = problem(
        tmp_path,
        IterativeDpoConfig,
        dpo={"data": {"max_tokens": 900}, "train": {"max_tokens_per_micro_batch": 1000}},
    )
    assert found.path == "dpo.train.max_tokens_per_micro_batch"
    assert "1800" in found.wanted and "dpo.data.max_tokens" in found.wanted
    assert (
        found.fix == "set dpo.train.max_tokens_per_micro_batch to 1800 or more, or lower dpo.data.max_tokens"
    )
    held_out = problem(tmp_path, RejectionSamplingConfig, sft={"eval": {"every_steps": 5}})
    assert held_out.path == "sft.eval.every_steps" and "sft.data.eval_share" in held_out.fix
    math = {"sources": [{"type": "math"}]}
    assert problem(tmp_path, RejectionSamplingConfig, reward=math).path == "data.label_key"


@pytest.mark.parametrize(
    ("schema", "changes", "path"),
    [
        (IterativeDpoConfig, {"rollout": {"group_size": 1}}, "rollout.group_size"),
        (RejectionSamplingConfig, {"data": {"response_key": "answer"}}, "data.response_key"),
        (RejectionSamplingConfig, {"sft": {"checkpoint": {"export": False}}}, "sft.checkpoint.export"),
        (ConditionalSftConfig, {"sft": {"reward_template": "none"}}, "sft.reward_template"),
        (
            GenerateRunConfig,
            {"rollout": {"group_size": 2, "sampling": {"temperature": 0}}},
            "rollout.group_size",
        ),
        (GenerateRunConfig, {"data": {"eval": "x.jsonl"}}, "data.eval"),
        (GenerateRunConfig, {"data": {"shuffle": True}}, "data.shuffle"),
        (GenerateRunConfig, {"data": {"response_key": "a"}, "reward": None}, "data.response_key"),
        (
            GenerateRunConfig,
            {"reward": {"sources": [{**FUNCTION, "normalize": True}]}},
            "reward.sources.0.normalize",
        ),
        (GenerateRunConfig, {"reward": {"sources": [{"type": "environment"}]}}, "reward.sources.0.type"),
        (GenerateRunConfig, {"reward": {"sources": [{"type": "math"}]}}, "data.label_key"),
        (GenerateRunConfig, {"train": {"num_steps": 3}}, "train"),
    ],
)
def test_contradictions_are_refused(
    schema: type[Any], changes: dict[str, Any], path: str, tmp_path: Path
) -> None:
    assert problem(tmp_path, schema, **changes).path == path


def test_greedy_and_unscored_generation_is_fine() -> None:
    config = chain(GenerateRunConfig, rollout={"sampling": {"temperature": 0}}, reward=None)
    assert config.reward is None
