"""Held-out prompts: every one once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.observe.metric_keys import check_keys
from rayrlhf.policy import rollouts as rollouts_module
from rayrlhf.policy.evaluate import FIRST_GROUP_ID, Evaluation, eval_plan, evaluate
from rayrlhf.policy.rollouts import Collector
from rayrlhf.reward.client import RewardFailure
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.collectives import Ranks
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
    """One token more per row."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    async def samples(
        self, prompt: Prompt, *, group_id: int, group_size: int, **call: Any
    ) -> AsyncIterator[Sample]:
        self.calls.append({"group_id": group_id, "group_size": group_size, **call})
        for i in range(group_size):
            yield make_sample(
                range(prompt.row_id + 1),
                prompt=prompt,
                group_id=group_id,
                sample_index=i,
                response=f"r{prompt.row_id}",
                score=None,
            )


class Rewards:
    """Scores a prompt by its row plus the sample's index, but for those that fail."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = failing

    async def score(self, samples: list[Sample]) -> list[Sample]:
        return [
            replace(s, source_rewards=(None if s.prompt.row_id in self.failing else self.raw(s),))
            for s in samples
        ]

    def raw(self, sample: Sample) -> float:
        return float(sample.prompt.row_id + sample.sample_index)

    def check(self, num_failed: int, num_samples: int) -> None:
        if num_failed > 0.5 * num_samples:
            raise RewardFailure(f"{num_failed} of {num_samples}")


def run(
    rows: list[int],
    rollouts: Any,
    rewards: Any,
    num_prompts: int,
    *,
    ranks: Ranks | None = None,
    reward: dict[str, Any] | None = None,
    **evaluation: Any,
) -> Evaluation:
    config = make_config(
        data={"train": "a.jsonl", "eval": "b.jsonl", "prompt_key": "question"},
        eval=evaluation,
        reward=reward or {},
    )
    prompts = [make_prompt(row_id=row, prompt=f"rendered {row}", question=f"q{row}") for row in rows]
    combiner = RewardCombiner(config.reward, response_limit=100)
    collector = Collector(rollouts, rewards)
    return evaluate(
        prompts,
        collector,
        rollouts_module.Rewards(rewards, combiner),
        config,
        ranks or Ranks(),
        num_prompts=num_prompts,
        version=7,
    )


def test_an_evaluation_by_hand() -> None:
    rollouts = Rollouts()
    found = run([0, 1, 2], rollouts, Rewards(), num_prompts=3)
    assert found.metrics["eval/reward_mean"] == 1.0
    assert found.metrics["eval/response_tokens_mean"] == 2.0
    assert 0.0 <= found.metrics["eval/reward_ci_low"] < 1.0 < found.metrics["eval/reward_ci_high"] <= 2.0
    check_keys(found.metrics)
    assert found.rows == [{"prompt": f"q{i}", "response": f"r{i}", "reward": float(i)} for i in range(3)]
    [call, *_] = rollouts.calls
    sampling = call.pop("sampling")
    assert call == {"group_id": FIRST_GROUP_ID, "group_size": 1, "min_version": 7}
    assert sampling.temperature == 0.0, "eval.sampling, not the training's"


def test_pass_rates_by_hand() -> None:
    """Scores are 0, 1, 2, 3 for row 0 and 1 to 4 for row 1; a pass is 3 or more: 1 of 4 and 2 of 4."""
    found = run(
        [0, 1], Rollouts(), Rewards(), 2, samples_per_prompt=4, pass_score=3.0, sampling={"temperature": 1.0}
    )
    check_keys(found.metrics)
    assert found.metrics["eval/pass_at_1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    # pass@2 = 1 - C(4 - c, 2)/C(4, 2): 1 - 3/6 and 1 - 1/6
    assert found.metrics["eval/pass_at_2"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert found.metrics["eval/pass_at_4"] == 1.0
    assert found.metrics["eval/reward_mean"] == 2.0  # 1.5 and 2.5
    assert len(found.rows) == 8


def test_17_a_right_answer_passes_however_long_it_is() -> None:
    """Responses of 100 tokens, the limit: the penalty of 1 is in the reward, not in whether one passes."""
    settings: dict[str, Any] = {
        "samples_per_prompt": 2,
        "pass_score": 100.0,
        "sampling": {"temperature": 1.0},
    }
    shaped = {"overlong": {"buffer_tokens": 10, "factor": 1.0}, "clip": [-5.0, 50.0]}
    found = run([99], Rollouts(), Rewards(), 1, reward=shaped, **settings)
    # Raw rewards 99 and 100, of which one passes: pass@1 = 1/2. Scores are 98 and 99, clipped to 50.
    assert found.metrics["eval/pass_at_1"] == 0.5 and found.metrics["eval/pass_at_2"] == 1.0
    assert found.metrics["eval/reward_mean"] == 50.0


def test_repeats_are_left_out() -> None:
    found = run([0, 1, 2, 0], Rollouts(), Rewards(), num_prompts=3)
    assert [row["prompt"] for row in found.rows] == ["q0", "q1", "q2"]
    assert found.metrics["eval/reward_mean"] == 1.0


class RankOne(Ranks):
    """Of two; rank 0 has these samples."""

    def __init__(self, of_rank_0: list[Sample]) -> None:
        self.of_rank_0 = of_rank_0

    @property
    def rank(self) -> int:
        return 1

    def gather(self, items: list[Any]) -> list[Any]:
        return [*self.of_rank_0, *items]


def test_all_ranks_results_are_put_together() -> None:
    """As rank 1 of two: prompts 3, 4 and a repeat of 0 are its own; 0, 1 and 2 come from rank 0."""
    theirs = [
        replace(
            make_sample(
                prompt=make_prompt(row_id=i, question=f"q{i}"), group_id=FIRST_GROUP_ID + i, score=float(i)
            ),
            source_rewards=(float(i),),
        )
        for i in range(3)
    ]
    rollouts = Rollouts()
    found = run([3, 4, 0], rollouts, Rewards(), num_prompts=5, ranks=RankOne(theirs))
    assert [call["group_id"] - FIRST_GROUP_ID for call in rollouts.calls] == [3, 4, 5]
    assert [row["prompt"] for row in found.rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert found.metrics["eval/reward_mean"] == 2.0


def test_failed_samples_are_left_out_or_end_the_run() -> None:
    found = run([0, 1, 2], Rollouts(), Rewards(failing=(0,)), num_prompts=3)
    assert found.metrics["eval/reward_mean"] == 1.5
    assert [row["prompt"] for row in found.rows] == ["q1", "q2"]
    with pytest.raises(RewardFailure, match="2 of 3"):
        run([0, 1, 2], Rollouts(), Rewards(failing=(0, 1)), num_prompts=3)
