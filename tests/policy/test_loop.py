"""The whole step on one page, run in one process: what is in a step, in which order, and that GRPO learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from rayrlhf.observe.metric_keys import check_keys

GRPO = {"advantage": "grpo", "kl_coef": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": GRPO, "train": {"num_steps": 12, "lr": 2e-3}},
    "grpo with a KL and two updates": {
        "algorithm": {
            "advantage": "grpo",
            "kl_coef": 0.05,
            "kl_in": "loss",
            "kl_estimator": "k3",
            "mini_batches": 2,
            "updates_per_batch": 2,
        },
    },
    "asynchronous, staleness 0": {"algorithm": GRPO, "rollout": {"max_staleness": 0}},
    "synchronous": {"algorithm": GRPO},
    "asynchronous, staleness 1": {"algorithm": GRPO, "rollout": {"max_staleness": 1}},
    "ppo": {"algorithm": {"kl_coef": 0.01, "critic_warmup_steps": 1}},
    "constant rewards at step 1": {"algorithm": {**GRPO, "dynamic_sampling": {"max_prompt_batches": 1}}},
}


def run_all(_: int, model: str, folder: str) -> None:
    """In a separate process, whose process group DeepSpeed uses: writes what each run reported."""
    from rayrlhf.policy.loop import policy_loop
    from tests.policy.one_process import config_of, run_of, share_of_low_bytes

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    found: dict[str, Any] = {}
    for name, sections in RUNS.items():
        config = config_of(model, Path(folder), **sections)
        calls = {"count": 0}

        def score(ids: Sequence[int], name: str = name, calls: dict[str, int] = calls) -> float:
            calls["count"] += 1
            of_step_1 = 24 < calls["count"] <= 48  # 4 groups of 6 per step
            return 0.5 if name.startswith("constant") and of_step_1 else share_of_low_bytes(ids)

        run, engine, reports = run_of(config, score)
        result = policy_loop(run)
        found[name] = {
            "steps": reports.steps,
            "warnings": reports.warnings,
            "pushed": engine.pushed,
            "min_versions": engine.min_versions,
            "steps_done": result.steps,
        }
    (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        spawn(run_all, args=(tiny_model, str(folder)), nprocs=1)
    return json.loads((folder / "found.json").read_text())


def test_grpo_learns(runs: dict[str, Any]) -> None:
    rewards = [step["reward/mean"] for step in runs["grpo"]["steps"]]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


@pytest.mark.parametrize("name", RUNS)
def test_every_step_pushes_and_reports(runs: dict[str, Any], name: str) -> None:
    run = runs[name]
    assert run["pushed"] == list(range(1, run["steps_done"] + 1))
    assert len(run["steps"]) == run["steps_done"]
    for step in run["steps"]:
        check_keys(step)


@pytest.mark.parametrize("name", [name for name in RUNS if "staleness 1" not in name])
def test_responses_come_from_the_weights_that_are_trained(runs: dict[str, Any], name: str) -> None:
    """Engine and trainer agree in every step, so each push has brought what the update made."""
    assert [step["rollout/staleness_max"] for step in runs[name]["steps"]] == [0.0] * len(runs[name]["steps"])
    for step in runs[name]["steps"]:
        assert step.get("rollout/logprob_diff_max", 0.0) < 1e-4


def test_with_staleness_0_the_numbers_are_the_synchronous_ones(runs: dict[str, Any]) -> None:
    kept = ("loss/", "reward/", "data/tokens", "rollout/logprob")
    ours, theirs = (
        [{key: value for key, value in step.items() if key.startswith(kept)} for step in runs[name]["steps"]]
        for name in ("asynchronous, staleness 0", "synchronous")
    )
    assert ours == theirs
    assert runs["asynchronous, staleness 0"]["min_versions"] == runs["synchronous"]["min_versions"]


def test_rollouts_run_ahead(runs: dict[str, Any]) -> None:
    """4 groups per step: with staleness 1 those of the next step are asked for before this one's update."""
    assert runs["synchronous"]["min_versions"] == [0] * 4 + [1] * 4 + [2] * 4
    assert runs["asynchronous, staleness 1"]["min_versions"] == [0] * 8 + [1] * 4


def test_the_critic_is_trained_before_the_actor_in_its_warmup(runs: dict[str, Any]) -> None:
    first, second, _ = runs["ppo"]["steps"]
    assert "loss/critic" in first and "loss/actor" not in first
    assert "loss/critic" in second and "loss/actor" in second
    assert second["rollout/logprob_diff_max"] < 1e-4, "the actor had not moved"


def test_the_kl_counts_from_the_second_update_on(runs: dict[str, Any]) -> None:
    first, *_ = runs["grpo with a KL and two updates"]["steps"]
    assert first["data/mini_batches"] == 2.0
    assert first["kl/mean"] > 0.0, "the policy moves within the step"
    assert first["loss/ratio"] != 1.0


def test_a_step_without_a_group_to_train_on_is_counted(runs: dict[str, Any]) -> None:
    before, empty, after = runs["constant rewards at step 1"]["steps"]
    assert [step["rollout/empty_steps"] for step in (before, empty, after)] == [0.0, 1.0, 0.0]
    assert empty["reward/std"] == 0.0 and "loss/actor" not in empty
    [warning] = runs["constant rewards at step 1"]["warnings"]
    assert warning.startswith("1: no group to train on: algorithm.dynamic_sampling keeps no group")
    assert after["loss/actor_grad_norm"] > 0.0
