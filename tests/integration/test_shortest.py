"""The shortest configuration of GRPO runs on two cores: model, data, a reward, nothing about devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.policy_runs import write_prompts

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]  # a separate Ray with two cores

REPOSITORY = Path(__file__).parents[2]
REWARD = "def vowels(responses):\n    return [float(sum(c in 'aeiou' for c in r)) for r in responses]\n"
# A machine of two cores without a GPU, wherever this runs.
ON_TWO_CORES = (
    "import os, runpy, sys; os.cpu_count = lambda: 2; "
    "sys.argv = ['jobs/ppo.py', sys.argv[1]]; runpy.run_path('jobs/ppo.py', run_name='__main__')"
)


def test_the_shortest_grpo_runs_on_two_cores(tmp_path: Path, tiny_model: str) -> None:
    """It was refused: three slots, and two cores."""
    (tmp_path / "reward.py").write_text(REWARD)
    tree = {
        "run": {"name": "shortest", "dir": str(tmp_path / "runs")},
        "model": {"path": tiny_model},
        # The tiny model reads 512 tokens, and the defaults would be prompts of 1,024.
        "data": {"train": str(write_prompts(tmp_path / "p.jsonl", 64)), "max_prompt_tokens": 64},
        "algorithm": {"advantage": "grpo"},
        "reward": {"sources": [{"type": "function", "function": f"{tmp_path / 'reward.py'}:vowels"}]},
        "train": {"num_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_CORES, str(tmp_path / "config.yaml")],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "placement.preset=auto: colocate_all, 1 slot" in done.stdout
    resolved = yaml.safe_load((tmp_path / "runs" / "shortest" / "config.yaml").read_text())
    assert resolved["placement"]["preset"] == "colocate_all"
    assert resolved["rollout"]["group_size"] == 8
    summary = json.loads((tmp_path / "runs" / "shortest" / "summary.json").read_text())
    assert Path(summary["export"], "config.json").is_file()
