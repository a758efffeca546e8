"""Engines split attention heads over GPUs: suggested sizes divide them, and configured ones must."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.capacity.advice import suggest
from rayrlhf.capacity.attention_heads import can_split, splits_evenly
from rayrlhf.capacity.budget import budget_of
from rayrlhf.capacity.gpu_types import parse_gpus
from rayrlhf.capacity.model_shape import ModelShape
from rayrlhf.commands.plan import main
from rayrlhf.config.base import ConfigError
from rayrlhf.config.job_kinds import load_any
from rayrlhf.runtime.file_checks import check_files
from tests.checkpoint_files import write_checkpoint

# Qwen2.5-7B: 28 heads, 4 for keys and values; 0.5B: 14 and 2.
SEVEN_B = ModelShape("7B", 3584, 28, 28, 4, 128, 18944, 152064, tied=False)
HALF_B = replace(SEVEN_B, heads=14, kv_heads=2)


@pytest.mark.parametrize(
    ("shape", "evenly", "at_all"),
    [
        (SEVEN_B, [1, 2, 4], [1, 2, 4, 28]),  # 28 GPUs: seven hold the same key-value head
        (HALF_B, [1, 2], [1, 2, 14]),
        (replace(SEVEN_B, heads=32, kv_heads=8), [1, 2, 4, 8], [1, 2, 4, 8, 16, 32]),
        (replace(SEVEN_B, heads=9, kv_heads=3), [1, 3], [1, 3, 9]),
    ],
)
def test_heads_are_divided(shape: ModelShape, evenly: list[int], at_all: list[int]) -> None:
    """vLLM asserts heads % n == 0, and kv_heads % n == 0 or n % kv_heads == 0."""
    assert [n for n in range(1, 65) if splits_evenly(shape, n)] == evenly
    assert [n for n in range(1, 65) if can_split(shape, n)] == at_all


def policy(folder: Path, *overrides: str, **config: Any) -> list[str]:
    """A large model, so that one GPU does not hold an engine."""
    large = {"hidden_size": 8192, "num_hidden_layers": 60, "intermediate_size": 28672, "vocab_size": 128256}
    write_checkpoint(folder / "model", **{**large, **config})
    tree = {
        "run": {"name": "x", "dir": str(folder)},
        "model": {"path": str(folder / "model")},
        "data": {"train": "p.jsonl"},
        "algorithm": {"advantage": "grpo"},
        "rollout": {"group_size": 8},
        "reward": {"sources": [{"type": "function", "function": "a:b"}]},
        "train": {"num_steps": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(tree))
    return [str(folder / "config.yaml"), *overrides]


@pytest.mark.parametrize(("heads", "kv_heads", "widths"), [(64, 8, {2, 4, 8}), (28, 4, {2, 4}), (14, 2, {2})])
def test_what_is_suggested_divides_the_heads(
    heads: int, kv_heads: int, widths: set[int], tmp_path: Path
) -> None:
    """All widths from 1 to 8 were tried, whatever the model."""
    argv = policy(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128)
    count, gpu = parse_gpus("64xH200-141")
    tried: list[int] = []

    def load(overrides: Any) -> Any:
        config = load_any([*argv, *overrides])
        tried.append(config.rollout.tensor_parallel)
        return config

    found = suggest(load_any(argv), count, gpu, load, lambda config: budget_of(config, gpu=gpu))
    assert set(tried) == {1, *widths}
    assert found is not None


def test_a_width_that_does_not_divide_the_heads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM found out in its workers, minutes later."""
    argv = policy(tmp_path, "rollout.tensor_parallel=3", num_attention_heads=28, num_key_value_heads=4)
    with pytest.raises(ConfigError) as caught:
        budget_of(load_any(argv))
    (problem,) = caught.value.problems
    assert problem.path == "rollout.tensor_parallel"
    assert problem.fix == "set rollout.tensor_parallel to one of 1, 2, 4, 28"
    assert main([*argv, "--gpus", "8xA100-80"]) == 2
    assert "28 attention heads and 4 key-value heads" in capsys.readouterr().err


def test_a_job_refuses_it_before_anything_starts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small")  # 4 heads, 2 for keys and values
    argv = policy(tmp_path, f"model.path={tmp_path / 'small'}")
    check_files(load_any([*argv, "rollout.tensor_parallel=4"]))
    with pytest.raises(ConfigError, match="one of 1, 2, 4"):
        check_files(load_any([*argv, "rollout.tensor_parallel=3"]))
    vllm = ["ref.engine=vllm", "ref.tensor_parallel=8", "ref.location=serve"]
    with pytest.raises(ConfigError, match=r"set ref\.tensor_parallel to one of 1, 2, 4"):
        check_files(load_any([*argv, *vllm]))
