"""SFT, a reward model, PPO against it and DPO, each from the exports of the stages before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.demo.data import ensure_data as ensure_prompts
from jobs.pipeline.run import Stage, outcome, stages
from jobs.tasks.sentences import ensure_data as ensure_sentences
from rayrlhf.config.parse import load_config
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.supervised import JOBS
from rayrlhf.policy.driver import run_policy
from rayrlhf.supervised.driver import run_supervised

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

TINY = ["placement.cpus_per_slot=0.5", "train.num_threads=1", "observe={console: lines, tensorboard: false}"]
# Of a byte-level model a sentence has five times as many tokens.
SUPERVISED = [
    "data.max_tokens=256",
    "train.max_tokens_per_micro_batch=1024",
    "train.lr=2e-3",
    "train.num_steps=4",
]
POLICY = [
    "data.max_prompt_tokens=160",
    "rollout.prompts_per_step=8",
    "rollout.num_threads=1",
    "train.num_steps=2",
    "eval.num_prompts=8",
]


def run(stage: Stage, runs: Path) -> dict[str, Any]:
    """The stage's summary."""
    policy = stage.job == "ppo"
    words = stage.command(runs, [*TINY, *(POLICY if policy else SUPERVISED)])[2:]
    if policy:
        code = run_policy(load_config(PolicyRunConfig, words))
    else:
        code = run_supervised(load_config(JOBS[stage.job], [*words, "eval.num_samples=32"]))
    assert code == 0
    return json.loads((runs / stage.name / "summary.json").read_text())


@pytest.mark.long
def test_each_stage_starts_from_the_exports_of_those_before(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    monkeypatch.chdir(Path(__file__).parents[2])  # the configs' paths are those of the repository
    ensure_prompts()
    ensure_sentences()
    summaries = {stage.name: run(stage, tmp_path) for stage in stages(Path(tiny_model), tmp_path)}
    assert list(summaries) == ["sft", "rm", "ppo", "dpo"]
    sft: Any = AutoModelForCausalLM.from_pretrained(summaries["sft"]["export"])
    start: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.equal(sft.lm_head.weight, start.lm_head.weight)
    # A model that continues where the SFT model was is near it after a few steps, and not the same.
    for stage in ("ppo", "dpo"):
        later: Any = AutoModelForCausalLM.from_pretrained(summaries[stage]["export"])
        moved = torch.linalg.norm(later.lm_head.weight - sft.lm_head.weight)
        assert 0 < moved < torch.linalg.norm(later.lm_head.weight - start.lm_head.weight)
    AutoModelForSequenceClassification.from_pretrained(summaries["rm"]["export"])
    # PPO's rewards are the reward model's scores.
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert all("reward/source/trained" in row for row in rows if "reward/mean" in row)
    assert outcome(tmp_path / "dpo").endswith("dpo/export")
