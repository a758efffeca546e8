"""Sequences that a model cannot read are reported before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.supervised import JOBS
from rayrlhf.models.positions import positions_of
from rayrlhf.runtime.length_checks import length_problems, length_warnings
from tests.integration.policy_runs import tiny_run


def folder(path: Path, **config: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("config", "limit", "is_table"),
    [
        ({"model_type": "gpt2", "n_positions": 1024, "n_ctx": 1024}, 1024, True),
        ({"model_type": "opt", "max_position_embeddings": 2048}, 2048, True),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512, True),
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096, False),
        ({"model_type": "bloom"}, None, False),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 2048,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            8192,
            False,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0},
            },
            131072,
            False,
        ),
        ({"model_type": "x", "text_config": {"max_position_embeddings": 64}}, 64, False),
    ],
)
def test_17e_positions_of_a_config(config: dict[str, Any], limit: int | None, is_table: bool) -> None:
    assert positions_of(config) == (limit, is_table)


def supervised(max_tokens: int) -> Any:
    tree = {
        "run": {"name": "x"},
        "model": {"path": "m"},
        "data": {"train": "none.jsonl", "max_tokens": max_tokens},
        "train": {"max_tokens_per_micro_batch": 10**6},
    }
    return JOBS["dpo"].model_validate(tree)


def test_17e_a_table_of_positions_is_an_error_for_every_reader(tmp_path: Path) -> None:
    gpt2 = folder(tmp_path / "gpt2", model_type="gpt2", n_positions=128)
    models = [("model.path", gpt2), ("ref.path", gpt2)]
    assert list(length_problems(supervised(128), models)) == []
    for problem, key in zip(length_problems(supervised(129), models), ("model", "ref"), strict=True):
        assert problem.path == "data.max_tokens" and f"({key}.path=" in problem.wanted
        assert "129" in problem.got and "128 tokens at most" in problem.wanted
        assert "lower data.max_tokens" in problem.fix


def test_17e_rotary_positions_are_a_warning_in_training(tmp_path: Path) -> None:
    llama = folder(tmp_path / "llama", model_type="llama", max_position_embeddings=128)
    models = [("model.path", llama)]
    assert list(length_problems(supervised(129), models)) == []
    [warning] = length_warnings(supervised(129), models)
    assert "data.max_tokens allows sequences of 129 tokens" in warning and "trained for 128" in warning
    assert list(length_warnings(supervised(128), models)) == []


def test_17e_an_engine_reads_no_more_than_its_model(tmp_path: Path) -> None:
    llama = folder(tmp_path / "llama", model_type="llama", max_position_embeddings=128)
    changes = {"sampling": {"max_new_tokens": 100}}
    data = {"max_prompt_tokens": 28}
    train = {"max_tokens_per_micro_batch": 4096}
    models = [("model.path", llama), ("critic.path", llama)]
    fits = tiny_run(
        tmp_path, llama, rollout=changes, data=data, train=train, eval={"sampling": {"max_new_tokens": 1}}
    )
    assert list(length_problems(fits, models)) == [] == list(length_warnings(fits, models))
    data = {"max_prompt_tokens": 29}
    long = tiny_run(
        tmp_path, llama, rollout=changes, data=data, train=train, eval={"sampling": {"max_new_tokens": 1}}
    )
    [problem] = length_problems(long, models)
    assert problem.path == "rollout.sampling.max_new_tokens"
    assert problem.got == "100 + data.max_prompt_tokens=29: sequences of up to 129 tokens"
    assert "128 tokens at most, which is what an engine can read (model.path=" in problem.wanted
    assert [w.partition(" allows")[0] for w in length_warnings(long, models)] == [
        "rollout.sampling.max_new_tokens"
    ]
    longer = tiny_run(
        tmp_path, llama, rollout=changes, train=train, eval={"sampling": {"max_new_tokens": 120}}
    )
    assert "eval.sampling.max_new_tokens" in [p.path for p in length_problems(longer, models)]
