"""Every shipped CPU config runs on a tiny model, and every estimator learns, from three seeds.

The task is verifiable and synthetic: the share of vowels in twelve bytes. An untrained byte-level model has
about 5/256 of them, and the best policy 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.environments.calculator import make_rows, write_rows
from rayrlhf.config.parse import load_config
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import write_prompts

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
NUM_STEPS = 30  # within which the reward must rise from under 0.3 to over 0.8
SEEDS = (1, 2, 3)


def shipped(name: str, folder: Path, model: str, *overrides: str) -> PolicyRunConfig:
    """jobs/configs/<name>-cpu.yaml on the tiny model and the task of vowels."""
    prompts = write_prompts(folder / "train.jsonl", 64)
    return load_config(
        PolicyRunConfig,
        [
            str(CONFIGS / f"{name}-cpu.yaml"),
            f"run.dir={folder / 'runs'}",
            "run.name=tiny",
            f"model.path={model}",
            f"data.train={prompts}",
            "data.eval=[]",
            "data.prompt_key=prompt",
            "data.label_key=null",
            "data.apply_chat_template=true",
            "eval.num_prompts=null",
            "rollout.sampling={max_new_tokens: 12}",
            "rollout.num_threads=1",
            "reward.sources=[{type: function, function: 'tests.integration.policy_runs:share_of_vowels'}]",
            "placement.cpus_per_slot=0.5",
            "train.lr=2e-3",
            "train.num_threads=1",
            "observe={console: lines, tensorboard: false}",
            *overrides,
        ],
    )


def rewards_of(folder: Path) -> list[float]:
    lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [row["reward/mean"] for row in map(json.loads, lines) if "reward/mean" in row]


def differences_of(folder: Path) -> list[float]:
    """The largest |log-probability of the trainer - of the engine| of each step."""
    lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [row["rollout/logprob_diff_max"] for row in map(json.loads, lines) if "reward/mean" in row]


LEARNERS: dict[str, list[str]] = {
    "ppo": ["critic.lr=1e-3"],
    "reinforce_pp": [],
    "reinforce_pp_baseline": [],
    "rloo": [],
    "grpo": [],
    "dr_grpo": [],
    "async": [],
}


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LEARNERS)
def test_the_reward_rises(tmp_path: Path, tiny_model: str, name: str, seed: int) -> None:
    overrides = [f"train.num_steps={NUM_STEPS}", f"run.seed={seed}", *LEARNERS[name]]
    assert run_policy(shipped(name, tmp_path, tiny_model, *overrides)) == 0
    rewards = rewards_of(tmp_path)
    assert len(rewards) == NUM_STEPS
    assert rewards[0] < 0.3
    assert sum(rewards[-3:]) / 3 > 0.8, f"{name}, seed {seed}: {rewards}"
    if name != "async":  # where some tokens are of older weights
        assert max(differences_of(tmp_path)) < 1e-4, "number 18: engines compute what the trainer computes"


OTHERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dapo": (["reward.overlong=null"], {"rollout/prompt_batches": 1.0}),
    "gspo": ([], {}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_it_runs(tmp_path: Path, tiny_model: str, name: str) -> None:
    overrides, wanted = OTHERS[name]
    assert run_policy(shipped(name, tmp_path, tiny_model, "train.num_steps=3", *overrides)) == 0
    assert len(rewards_of(tmp_path)) == 3
    assert max(differences_of(tmp_path)) < 1e-4
    last = json.loads((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1])
    for key, value in wanted.items():
        assert last[key] >= value


def test_the_agent_runs(tmp_path: Path, tiny_model: str) -> None:
    """Whether agents learn is test_agents' to show."""
    rows = write_rows(tmp_path / "sums.jsonl", make_rows(64, seed=0, largest=9, num_terms=2))
    config = shipped(
        "agent",
        tmp_path,
        tiny_model,
        "train.num_steps=2",
        f"data.train={rows}",
        "rollout.environment.arguments={instructions: ''}",
        "reward.sources=[{type: environment}]",
    )
    assert run_policy(config) == 0
    assert len(rewards_of(tmp_path)) == 2
    assert max(differences_of(tmp_path)) < 1e-4


def test_every_cpu_config_is_run_here() -> None:
    policies = [path for path in CONFIGS.glob("*-cpu.yaml") if "\njob: " not in path.read_text()]
    shipped_names = {path.name.removesuffix("-cpu.yaml") for path in policies}
    assert shipped_names == {*LEARNERS, *OTHERS, "agent"}


def trained_groups(folder: Path) -> list[set[int]]:
    """Groups trained on in each step."""
    rows = [json.loads(line) for line in (folder / "runs/tiny/rollouts.jsonl").read_text().splitlines()]
    steps = sorted({row["step"] for row in rows})
    return [{row["group"] for row in rows if row["step"] == step} for step in steps]


@pytest.mark.long
def test_dynamic_sampling_uses_more_prompts_and_resumes_where_it_stopped(
    tmp_path: Path, tiny_model: str
) -> None:
    """Vowels are rare at first: groups without any are dropped, and further prompts are sampled."""
    harder = [
        "rollout.prompts_per_step=4",
        "rollout.group_size=2",
        "rollout.sampling={max_new_tokens: 4}",
        "reward.overlong=null",
        "algorithm.dynamic_sampling.max_prompt_batches=3",
        "observe.rollouts_per_step=100",
        "train.lr=0",  # the same policy throughout: the number of prompt batches depends on the prompts alone
    ]
    for folder, lengths in (("whole", [6]), ("halves", [3, 6])):
        (tmp_path / folder).mkdir()
        for num_steps in lengths:
            config = shipped("dapo", tmp_path / folder, tiny_model, f"train.num_steps={num_steps}", *harder)
            assert run_policy(config) == 0
    assert trained_groups(tmp_path / "halves") == trained_groups(tmp_path / "whole")
    rows = [
        json.loads(line) for line in (tmp_path / "whole/runs/tiny/metrics.jsonl").read_text().splitlines()
    ]
    sampled = [row for row in rows if "rollout/prompt_batches" in row]
    counts = [row["rollout/prompt_batches"] for row in sampled]
    assert len(counts) == 6 and max(counts) > 1, "a batch of four groups must have held some without a vowel"
    assert all(row["rollout/samples"] == 8 * row["rollout/prompt_batches"] for row in sampled)
