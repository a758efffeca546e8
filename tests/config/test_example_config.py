"""The data sections of supervised training."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rayrlhf.config.base import Problem
from rayrlhf.config.errors import explain
from rayrlhf.config.example_data import (
    ExampleDataConfig,
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)

TRAIN = {"train": "rows.jsonl"}


def problems(class_: type[ExampleDataConfig], **fields: Any) -> dict[str, Problem]:
    values = {**TRAIN, **fields}
    with pytest.raises(ValidationError) as caught:
        class_.model_validate(values)
    found = explain(caught.value, class_, values)
    assert all(problem.got and problem.wanted and problem.fix for problem in found)
    return {problem.path: problem for problem in found}


@pytest.mark.parametrize("class_", [SftDataConfig, PairDataConfig, KtoDataConfig])
def test_a_path_is_enough(class_: type[ExampleDataConfig]) -> None:
    config = class_.model_validate(TRAIN)
    assert [source.path for source in config.sources_of("train")] == ["rows.jsonl"]
    assert config.sources_of("eval") == [] and not config.has_eval


def test_a_share_is_taken_of_the_training_rows() -> None:
    config = SftDataConfig.model_validate({**TRAIN, "eval_share": 0.1})
    assert config.has_eval and config.sources_of("eval") == config.train
    files = SftDataConfig.model_validate({**TRAIN, "eval": "held.jsonl"})
    assert files.has_eval and [source.path for source in files.sources_of("eval")] == ["held.jsonl"]


def test_two_ways_to_hold_out() -> None:
    problem = problems(SftDataConfig, eval="held.jsonl", eval_share=0.1)["eval_share"]
    assert "held.jsonl" in problem.got and problem.fix == "remove data.eval_share or data.eval"


@pytest.mark.parametrize(
    "class_, fields, path, words",
    [
        (SftDataConfig, {"eval_share": 1.0}, "eval_share", "< 1"),
        (SftDataConfig, {"max_tokens": 0}, "max_tokens", ">= 1"),
        (SftDataConfig, {"format": "sharegtp"}, "format", "did you mean sharegpt?"),
        (SftDataConfig, {"on_long": "cut"}, "on_long", "truncate_tail"),
        (SftDataConfig, {"on_duplicate_id": "skip"}, "on_duplicate_id", "data.id_key"),
        (SftDataConfig, {"mixing_stops": "all_exhausted"}, "mixing_stops", "probability"),
        (SftDataConfig, {"format": "text"}, "learn", "set data.learn to all"),
        (
            SftDataConfig,
            {"format": "text", "learn": "all", "system_prompt": "be"},
            "system_prompt",
            "remove data.system_prompt",
        ),
        (SftDataConfig, {"reward_key": "r"}, "reward_template", "give data.reward_template"),
        (SftDataConfig, {"reward_template": "{}"}, "reward_key", "give data.reward_key"),
        (SftDataConfig, {"reward_key": "r", "reward_template": "r"}, "reward_template", "with {} where"),
        (SftDataConfig, {"input_template": "<{}>"}, "input_template", "data.apply_chat_template to false"),
        (SftDataConfig, {"chosen_key": "c"}, "chosen_key", "no such key"),
        (PrmDataConfig, {}, "step_token", "nothing"),
        (PrmDataConfig, {"step_token": ""}, "step_token", "not empty"),
        (KtoDataConfig, {"label_key": ""}, "label_key", "not empty"),
        (PairDataConfig, {"train": [{"path": "a", "probability": 1.0}, "b"]}, "train", "add one to train.1"),
    ],
)
def test_contradictions_name_key_and_fix(
    class_: type[ExampleDataConfig], fields: dict[str, Any], path: str, words: str
) -> None:
    found = problems(class_, **fields)
    assert list(found) == [path]
    assert words in str(found[path])


def test_mixing_until_all_are_through() -> None:
    train = [{"path": "a", "probability": 1.0}, {"path": "b", "probability": 2.0}]
    assert (
        PairDataConfig.model_validate({"train": train, "mixing_stops": "all_exhausted"}).train[1].path == "b"
    )
