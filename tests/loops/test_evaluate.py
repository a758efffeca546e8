"""Held-out prompts: every one once, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.batch import Prompt, Sample
from rayrlhf.loops import evaluate as evaluate_module
from rayrlhf.loops.evaluate import EVAL_STEP, Evaluation, eval_plan, evaluate
from rayrlhf.observe.metrics import METRICS
from rayrlhf.reward.score import RewardFailure
from tests.samples import make_config, make_prompt, make_sample


def test_plans_by_hand() -> None:
    assert eval_plan(4, 2).tolist() == [[[0, 1], [2, 3]]]
    assert eval_plan(5, 2).tolist() == [[[0, 1, 2], [3, 4, 0]]]
    assert eval_plan(1, 3).tolist() == [[[0], [0], [0]]]


@given(st.integers(1, 200), st.integers(1, 9))
def test_a_plan_covers_every_prompt_in_order(num_prompts: int, world_size: int) -> None:
    plan = eval_plan(num_prompts, world_size)
    per_rank = plan.shape[2]
    assert plan.shape == (1, world_size, per_rank)
    assert (per_rank - 1) * world_size < num_prompts <= per_rank * world_size
    rows = plan.reshape(-1)
    # A rank's n-th prompt has the group id rank · per_rank + n; from num_prompts on they are repeats.
    assert rows[:num_prompts].tolist() == list(range(num_prompts))
    assert all(0 <= row < num_prompts for row in rows[num_prompts:])


class Rollouts:
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    async def group(self, prompt: Prompt, *, group_id: int, **call: Any) -> list[Sample]:
        self.calls.append({"group_id": group_id, **call})
        tokens = range(prompt.row_id + 1)
        return [
            make_sample(tokens, prompt=prompt, group_id=group_id, response=f"r{prompt.row_id}", score=None)
        ]


class Rewards:
    """Scores a prompt by its row, but for those that fail; more than half of them must not."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = failing

    async def score(self, samples: list[Sample]) -> list[Sample]:
        return [
            replace(s, score=None if s.prompt.row_id in self.failing else float(s.prompt.row_id))
            for s in samples
        ]

    def check(self, num_failed: int, num_samples: int) -> None:
        if num_failed > 0.5 * num_samples:
            raise RewardFailure(f"{num_failed} of {num_samples}")


def run(rows: list[int], rollouts: Any, rewards: Any, num_prompts: int) -> Evaluation:
    config = make_config(data={"train": "a.jsonl", "eval": "b.jsonl", "prompt_key": "question"})
    prompts = [make_prompt(row_id=row, prompt=f"rendered {row}", question=f"q{row}") for row in rows]
    return evaluate(prompts, rollouts, rewards, config, num_prompts=num_prompts, version=7)


def test_an_evaluation_by_hand() -> None:
    rollouts = Rollouts()
    found = run([0, 1, 2], rollouts, Rewards(), num_prompts=3)
    assert found.metrics["eval/reward_mean"] == 1.0
    assert found.metrics["eval/response_tokens_mean"] == 2.0
    assert 0.0 <= found.metrics["eval/reward_ci_low"] < 1.0 < found.metrics["eval/reward_ci_high"] <= 2.0
    assert set(found.metrics) <= set(METRICS)
    assert found.rows == [{"prompt": f"q{i}", "response": f"r{i}", "reward": float(i)} for i in range(3)]
    [call, *_] = rollouts.calls
    sampling = call.pop("sampling")
    assert call == {"group_id": 0, "group_size": 1, "step": EVAL_STEP, "min_version": 7}
    assert sampling.temperature == 0.0, "eval.sampling, not the training's"


def test_seeds_of_training_are_never_used() -> None:
    assert EVAL_STEP > 10**9


def test_repeats_are_left_out() -> None:
    found = run([0, 1, 2, 0], Rollouts(), Rewards(), num_prompts=3)
    assert [row["prompt"] for row in found.rows] == ["q0", "q1", "q2"]
    assert found.metrics["eval/reward_mean"] == 1.0


def test_all_ranks_results_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 1 of two: prompts 3, 4 and a repeat of 0 are its own; 0, 1 and 2 come from rank 0."""
    theirs = [
        make_sample(prompt=make_prompt(row_id=i, question=f"q{i}"), group_id=i, score=float(i))
        for i in range(3)
    ]
    monkeypatch.setattr(evaluate_module.collectives, "rank", lambda: 1)
    monkeypatch.setattr(evaluate_module.collectives, "gather_lists", lambda mine: [*theirs, *mine])
    rollouts = Rollouts()
    found = run([3, 4, 0], rollouts, Rewards(), num_prompts=5)
    assert [call["group_id"] for call in rollouts.calls] == [3, 4, 5]
    assert [row["prompt"] for row in found.rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert found.metrics["eval/reward_mean"] == 2.0


def test_failed_samples_are_left_out_or_end_the_run() -> None:
    found = run([0, 1, 2], Rollouts(), Rewards(failing=(0,)), num_prompts=3)
    assert found.metrics["eval/reward_mean"] == 1.5
    assert [row["prompt"] for row in found.rows] == ["q1", "q2"]
    with pytest.raises(RewardFailure, match="2 of 3"):
        run([0, 1, 2], Rollouts(), Rewards(failing=(0, 1)), num_prompts=3)
