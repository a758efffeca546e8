"""PPO's tricks together in one run: what each leaves behind in metrics, checkpoints and exports."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run, write_prompts

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

TEXT = "the quick brown fox jumps over the lazy dog"
NUM_STEPS = 6


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


@pytest.mark.long
def test_the_tricks_of_ppo(tmp_path: Path, tiny_model: str) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(32)))
    sections: dict[str, Any] = {
        "data": {
            "train": str(write_prompts(tmp_path / "train.jsonl", 64)),
            "eval": str(write_prompts(tmp_path / "test.jsonl", 16)),
            "max_prompt_tokens": 64,
            "ptx": {"sources": str(texts), "texts_per_step": 8, "max_tokens": 64},
        },
        "algorithm": {
            "policy_loss": "cispo",
            "kl_coef": 0.01,
            "kl_controller": "adaptive",
            "kl_target": 0.5,
            "kl_horizon": 100,
            "critic_warmup_steps": 2,
            "ema_beta": 0.5,
            "ptx_coef": 1.0,
            "entropy_coef": 0.001,
            "rollout_correction": {"mode": "mask", "level": "sequence", "low": 0.1, "high": 10.0},
        },
        "reward": {
            "sources": [
                {
                    "type": "function",
                    "function": "tests.integration.policy_runs:share_of_vowels",
                    "name": "vowels",
                    "normalize": True,
                }
            ],
            "clip": [-5.0, 5.0],
            "overlong": {"buffer_tokens": 4, "factor": 0.5},
        },
        "rollout": {"prompts_per_step": 16, "group_size": 2},
        "eval": {"every_steps": 2, "samples_per_prompt": 2, "pass_score": 0.1},
    }
    # Stopped after four steps and started again: what the tricks keep must come back.
    for num_steps in (4, NUM_STEPS):
        assert run_policy(tiny_run(tmp_path, tiny_model, train={"num_steps": num_steps}, **sections)) == 0
    run_path = tmp_path / "runs/tiny"
    rows = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in steps] == [*range(1, NUM_STEPS + 1)]

    assert ["loss/actor" in row for row in steps] == [False, False, True, True, True, True], "frozen at first"
    assert all("loss/critic" in row for row in steps)
    assert steps[-1]["loss/ptx"] < steps[2]["loss/ptx"] - 0.5, (
        "the texts are trained on in addition to the reward"
    )
    coefs = [row["kl/coef"] for row in steps]
    assert coefs[:2] == [0.01, 0.01] and len(set(coefs)) > 2, "no KL is measured while the actor is frozen"
    # β changes by at most 20 % · 32/100 a step, also over the restart.
    assert all(abs(later / earlier - 1) <= 0.2 * 0.32 + 1e-9 for earlier, later in pairwise(coefs))
    assert all(0 <= row["reward/source/vowels"] <= 1 for row in steps), "raw, before normalisation"
    # In full: every response is 12 tokens long, the limit. Normalised scores of the first step have mean 0.
    assert steps[0]["reward/mean"] == pytest.approx(-0.5, abs=0.2)
    assert all(row["loss/is_masked_fraction"] == 0 for row in steps[2:]), "engine and trainer agree"

    during = [row for row in rows if "eval/pass_at_2" in row]
    assert len(during) >= 4 and all(row["eval/pass_at_2"] >= row["eval/pass_at_1"] for row in during)
    summary = json.loads((run_path / "summary.json").read_text())
    evaluated = {row["step"]: row["eval/reward_mean"] for row in during if row["step"] > 0}
    assert summary["best"]["reward"] == max(evaluated.values())
    final, average, best = (weights(run_path / name) for name in ("export", "export-ema", "best"))
    assert final.keys() == average.keys() == best.keys()
    assert any(not torch.equal(final[name], average[name]) for name in final)
    initial = weights(Path(tiny_model))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (average[name] - initial[name]).norm() < (final[name] - initial[name]).norm(), "it lags behind"
