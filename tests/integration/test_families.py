"""Engines hold what is trained, for every family that transformers and vLLM both know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run
from tests.tiny_families import FAMILIES, make_family

pytestmark = [pytest.mark.slow, pytest.mark.long]

START_SECONDS = 540


@pytest.mark.parametrize("family", FAMILIES)
def test_17a_an_engine_agrees_before_and_after_pushes(family: str, tmp_path: Path) -> None:
    """The same weights, then others, through buckets into a real engine, whose every layer is reloaded."""
    differences = probe(make_family(tmp_path / family, family))
    assert len(differences) == 4
    assert max(differences) < 1e-3, f"{family}: {differences} before, the same, others, after a broken one"


def probe(folder: str, *samplings: dict[str, Any]) -> list[float]:
    """What tests/integration/engine_probe.py says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.engine_probe", folder, *map(json.dumps, samplings)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.3, "max_new_tokens": 24},
    {"temperature": 0.7, "max_new_tokens": 5},
    {"temperature": 1.7, "max_new_tokens": 48},
    {"stop": ["a", "<|extra|>", "<|user|>", "<|tool|>", "<pad>"], "max_new_tokens": 48},
]


def test_18_log_probs_agree_whatever_sampling_is_allowed(tmp_path: Path) -> None:
    """Sampling settings allowed for training samples; the others are refused."""
    found = probe(make_family(tmp_path / "llama", "llama"), *SAMPLINGS)
    assert len(found) == 4 + len(SAMPLINGS)
    assert max(found) < 1e-4, found


# Mixtral's experts are gathered from two workers; a step of lr 0 pushes the weights that the engine holds.
RUNS = [(family, 1e-3, 3 if family == "mixtral" else 2) for family in FAMILIES] + [("qwen2_moe", 0.0, 2)]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("family", "lr", "zero_stage"), RUNS)
def test_17a_a_grpo_run_pushes_what_it_trains(
    family: str, lr: float, zero_stage: int, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "critic": None,
        "algorithm": {"advantage": "grpo", "kl_coef": 0.0},
        "rollout": {"group_size": 4, "prompts_per_step": 8},
        "train": {"num_steps": 3, "lr": lr, "zero_stage": zero_stage, "num_workers": 1 + (zero_stage == 3)},
    }
    model = make_family(tmp_path / family, family)
    assert run_policy(tiny_run(tmp_path, model, **changes)) == 0
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["rollout/logprob_diff_max"] < 1e-3 for step in steps] == [True] * 3, [
        step["rollout/logprob_diff_max"] for step in steps
    ]
