"""The main job on a tiny model, with everything real: Data, Train + DeepSpeed, Serve + vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.commands.merge_lora import main as merge_lora
from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run, write_prompts
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "tiny" / "summary.json").read_text())


def test_ppo_learns_resumes_and_exports(tmp_path: Path, tiny_model: str) -> None:
    held_out = {"eval": str(write_prompts(tmp_path / "test.jsonl", 64))}
    data = {"train": str(write_prompts(tmp_path / "train.jsonl", 64)), "max_prompt_tokens": 64, **held_out}

    assert run_policy(tiny_run(tmp_path, tiny_model, data=data, train={"num_steps": 8})) == 0
    halfway = summary_of(tmp_path)
    assert run_policy(tiny_run(tmp_path, tiny_model, data=data, train={"num_steps": 20})) == 0
    summary = summary_of(tmp_path)

    # By chance the two 95 % intervals would part in less than one run of a hundred; learning parts them by
    # far.
    assert summary["reward_after_ci"][0] > summary["reward_before_ci"][1]
    assert summary["reward_after"] > summary["reward_before"] + 0.2
    assert summary["reward_before"] == halfway["reward_before"]  # kept in the checkpoint, not measured again
    metrics = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in metrics if "reward/mean" in line]
    assert steps == list(range(1, 21)), "the second start must go on at step 9"
    assert max(line["rollout/logprob_diff_mean"] for line in metrics if "reward/mean" in line) < 1e-3
    rollouts = [json.loads(line) for line in (tmp_path / "runs/tiny/rollouts.jsonl").read_text().splitlines()]
    assert all(row["policy_version"] == row["step"] - 1 for row in rollouts)
    assert list((tmp_path / "runs/tiny/tensorboard").iterdir())

    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    model: Any = AutoModelForCausalLM.from_pretrained(summary["export"], dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 3"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert sum(c in "aeiou" for c in text) > len(text) / 2, f"the export was not trained: {text!r}"


@pytest.mark.long
def test_two_workers_two_engines_served_reward_and_reference(tmp_path: Path, tiny_model: str) -> None:
    """All but the critic on separate slots, and a reward model that reads the sample's own tokens.

    The workers share their sequences; then a single worker resumes from their checkpoint.
    """
    reward_model = make_tiny_model(tmp_path / "reward", seed=1, sequence_classification=True)
    config = tiny_run(
        tmp_path,
        tiny_model,
        model={"sequence_parallel": 2},
        train={"num_steps": 2, "num_workers": 2, "zero_stage": 3},
        rollout={"num_engines": 2, "group_size": 2, "prompts_per_step": 8},
        critic={"lr": 1e-3, "location": "worker"},  # a separate trainer is tested in test_presets.py
        ref={"location": "serve"},
        reward={"sources": [{"type": "model", "path": reward_model}, *function_source()]},
        placement={"preset": "disaggregated", "cpus_per_slot": 0.5},
        algorithm={"kl_coef": 0.01, "mini_batches": 2, "updates_per_batch": 2, "ema_beta": 0.9},
    )
    assert run_policy(config) == 0
    fewer = config.train.model_copy(update={"num_steps": 3, "num_workers": 1})
    alone = config.model.model_copy(update={"sequence_parallel": 1})
    assert run_policy(config.model_copy(update={"train": fewer, "model": alone})) == 0
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    for step in map(json.loads, lines[1:]):
        assert step["data/samples"] == 16
        assert step["reward/failed"] == 0
        assert abs(step["kl/mean"]) < 5.0


def function_source() -> list[dict[str, Any]]:
    return [{"type": "function", "function": "tests.integration.policy_runs:share_of_vowels", "weight": 0.5}]


@pytest.mark.long
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_grpo_without_critic_and_adapters_without_a_reference_model(
    quantization: str | None, tmp_path: Path, tiny_model: str
) -> None:
    """What is sampled from, trained and held to its start is one model with adapters."""
    changes: dict[str, Any] = {
        "critic": None,
        "model": {"lora": {"rank": 8, "alpha": 32}, "quantization": quantization},
        "algorithm": {"advantage": "grpo", "kl_coef": 0.01, "ema_beta": 0.5},
        "rollout": {"group_size": 4, "prompts_per_step": 8},
        "train": {"num_steps": 3, "lr": 1e-2},
    }
    assert run_policy(tiny_run(tmp_path, tiny_model, **changes)) == 0
    steps = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    first, *_, last = steps
    assert "loss/critic" not in last
    assert last["loss/ratio"] == pytest.approx(1.0)  # one update per batch starts at the old policy itself
    assert first["kl/mean"] == 0 and last["kl/mean"] > 1e-4, "the policy starts as its own reference"
    assert first["rollout/logprob_diff_mean"] < 1e-3, "the engines hold what is trained from the start"
    assert last["rollout/logprob_diff_mean"] < 1e-3, "the engines hold the trained adapters"

    export = tmp_path / "runs/tiny/export"
    weights, start = (load_file(folder / "model.safetensors") for folder in (export, Path(tiny_model)))
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if "_proj" in name}
    if quantization is not None:
        changes["train"] = {"num_steps": 4, "lr": 1e-2}
        assert run_policy(tiny_run(tmp_path, tiny_model, **changes)) == 0
        lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
        *_, again = [json.loads(line) for line in lines]
        assert again["step"] == 4 and again["rollout/logprob_diff_mean"] < 1e-3
        return
    assert merge_lora([str(export / "adapter"), str(tmp_path / "merged")]) == 0
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-7)

    changes["model"] = {}
    changes["train"] = {"num_steps": 4}
    assert run_policy(tiny_run(tmp_path, tiny_model, **changes)) == 2, (
        "a checkpoint of adapters is no model's"
    )
