"""From prompts to the groups of a step, with engines and rewards of plain Python."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.algorithm import AlgorithmConfig, DynamicSamplingConfig
from rayrlhf.config.rollout import SamplingConfig
from rayrlhf.observe.metric_keys import check_keys
from rayrlhf.policy import rollouts as rollouts_module
from rayrlhf.policy.rollouts import (
    Collector,
    StepGroups,
    collect_groups,
    count_groups,
    first_groups,
    informative,
    scored_groups,
)
from rayrlhf.reward.client import RewardFailure
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.collectives import Ranks
from tests.samples import make_config, make_prompt, make_sample

SAMPLING = SamplingConfig(temperature=0.5)
SOURCES = [{"type": "function", "function": "rewards:right", "name": "right"}]


class Rollouts:
    """Answers the first prompt last, and the last sample of a group first."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    async def samples(
        self, prompt: Prompt, *, group_id: int, group_size: int, **call: Any
    ) -> AsyncIterator[Sample]:
        self.calls.append(call)
        for i in reversed(range(group_size)):
            for _ in range(10 - prompt.row_id):
                await asyncio.sleep(0)
            response = f"{prompt.row_id}{i}"
            yield make_sample(prompt=prompt, group_id=group_id, sample_index=i, response=response, score=None)


class Rewards:
    """Scores a response by its own number."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []

    async def score(self, samples: list[Sample]) -> list[Sample]:
        self.requests.append([sample.response for sample in samples])
        return [replace(sample, source_rewards=(float(sample.response),)) for sample in samples]


def collected(rollouts: Any, rewards: Any, on_group: Any = lambda done: None) -> list[Sample]:
    prompts = [(6 + row_id, make_prompt(row_id=row_id)) for row_id in range(3)]
    collector = Collector(rollouts, rewards)
    return collector.collect(prompts, version=2, group_size=2, sampling=SAMPLING, on_group=on_group)


def test_samples_come_in_the_order_of_their_prompts() -> None:
    rollouts, done = Rollouts(), []
    samples = collected(rollouts, Rewards(), done.append)
    assert [sample.response for sample in samples] == ["00", "01", "10", "11", "20", "21"]
    assert [sample.group_id for sample in samples] == [6, 6, 7, 7, 8, 8]
    assert [sample.source_rewards for sample in samples] == [
        (0.0,),
        (1.0,),
        (10.0,),
        (11.0,),
        (20.0,),
        (21.0,),
    ]
    assert rollouts.calls == [{"min_version": 2, "sampling": SAMPLING}] * 3
    assert done == [1, 2, 3]


def test_a_group_is_one_request_and_is_scored_while_others_are_generated() -> None:
    class LastOneWaits(Rollouts):
        """The last prompt's group is generated only when the others have been scored."""

        async def samples(self, prompt: Prompt, **call: Any) -> AsyncIterator[Sample]:
            async for sample in super().samples(prompt, **call):
                while prompt.row_id == 2 and len(rewards.requests) < 2:
                    await asyncio.sleep(0.001)
                yield sample

    rewards = Rewards()
    assert len(collected(LastOneWaits(), rewards)) == 6
    assert sorted(rewards.requests) == [["00", "01"], ["10", "11"], ["20", "21"]]
    assert rewards.requests[2] == ["20", "21"]


def test_a_request_that_fails_for_good_ends_the_step() -> None:
    class NoEngines:
        async def samples(self, prompt: Prompt, **_call: Any) -> AsyncIterator[Sample]:
            if prompt.row_id == 1:
                raise TimeoutError("no engine answered")
            await asyncio.Event().wait()
            yield make_sample()

    with pytest.raises(TimeoutError, match="no engine answered"):
        collected(NoEngines(), Rewards())


# Which samples are trained on; other ranks' groups are put in by hand


def groups_and_scores(*pairs: tuple[int, float | None]) -> list[Sample]:
    """Of one reward source, whose reward is the score."""
    return [
        replace(make_sample(group_id=group, score=score), source_rewards=(score,)) for group, score in pairs
    ]


def combiner_of(*sources: dict[str, Any]) -> RewardCombiner:
    config = make_config(reward={"sources": list(sources)})
    return RewardCombiner(config.reward, response_limit=256)


def test_unscored_samples_are_dropped() -> None:
    samples = groups_and_scores((0, 1.0), (1, None), (2, 0.0))
    assert scored_groups(samples, needs_group=False) == [samples[0], samples[2]]


def test_the_last_of_a_group_has_nothing_to_be_compared_with() -> None:
    samples = groups_and_scores((4, 1.0), (4, None), (0, None), (0, None), (2, 1.0), (2, 0.0), (2, None))
    assert scored_groups(samples, needs_group=True) == [samples[4], samples[5]]
    assert scored_groups(samples[:4], needs_group=True) == []
    assert scored_groups([], needs_group=True) == []


def judged(samples: list[Sample], *, low: float | None = None, high: float | None = None) -> list[Sample]:
    return informative(samples, DynamicSamplingConfig(low=low, high=high), combiner_of(*SOURCES))


def test_groups_that_teach_nothing_are_left_out() -> None:
    samples = groups_and_scores(
        (0, 0.0), (0, 0.0), (1, 1.0), (1, 0.0), (2, 1.0), (2, 1.0), (3, 0.5), (3, 0.7), (4, 0.5), (4, 0.5)
    )
    assert judged(samples) == [samples[2], samples[3], samples[6], samples[7]]
    # Means are 0, 0.5, 1, 0.6 and 0.5; both ends are outside, and equal rewards teach nothing in between.
    assert judged(samples, low=0.0, high=1.0) == judged(samples)
    assert judged(samples, low=0.5) == judged(samples, low=0.5, high=1.0) == samples[6:8]
    assert judged(samples, high=0.6) == samples[2:4]


LIMIT, BUFFER = 4096, 1024  # of dapo-8x-gpu.yaml


def dapo(right: list[bool], lengths: list[int], *, correct: float = 1.0, wrong: float = 0.0) -> Any:
    """Scores of one group with DAPO's overlong penalty, and how many samples of it are kept."""
    config = make_config(
        reward={"sources": SOURCES, "overlong": {"buffer_tokens": BUFFER, "factor": 1.0}},
        rollout={"sampling": {"max_new_tokens": LIMIT}},
        train={"num_steps": 1, "max_tokens_per_micro_batch": 8192},
    )
    combiner = RewardCombiner(config.reward, response_limit=LIMIT)
    samples = [
        replace(make_sample([1] * length), source_rewards=(correct if is_right else wrong,), score=None)
        for is_right, length in zip(right, lengths, strict=True)
    ]
    scored = combiner.combine(samples, lambda tensor: tensor)
    mean = sum(sample.score or 0.0 for sample in scored) / len(scored)
    return mean, len(informative(scored, DynamicSamplingConfig(), combiner))


def test_6_a_group_is_judged_by_its_raw_rewards() -> None:
    # 4 of 16 right, 5 of the wrong ones at the limit: (4 - 5)/16 = -0.0625 after the penalty, 0.25 before.
    mean, kept = dapo([True] * 4 + [False] * 12, [100] * 11 + [LIMIT] * 5)
    assert mean == -0.0625 and kept == 16
    # All right, one of 4000 tokens: its penalty is (4000 - 3072)/1024 = 0.90625, the mean 0.943; no answer
    # is better than another.
    mean, kept = dapo([True] * 16, [100] * 15 + [4000])
    assert mean == pytest.approx(1 - 0.90625 / 16) and kept == 0


@pytest.mark.parametrize("num_right", [0, 1, 8, 15, 16])
def test_6_the_papers_rewards_lose_no_group_that_differs(num_right: int) -> None:
    """Accuracy 1/2 or less has a mean reward of 0 or less with {correct: 1, wrong: -1}."""
    right = [True] * num_right + [False] * (16 - num_right)
    assert dapo(right, [100] * 16, wrong=-1.0)[1] == (16 if 0 < num_right < 16 else 0)


rewards_of_groups = st.lists(
    st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=1, max_size=4), max_size=5
)


@given(rewards_of_groups, st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_6_scale_and_offset_of_the_rewards_change_nothing(
    groups: list[list[float]], scale: float, offset: float
) -> None:
    pairs = [(i, reward) for i, group in enumerate(groups) for reward in group]
    moved = [(i, scale * reward + offset) for i, reward in pairs]
    kept, kept_moved = (
        [(s.group_id, i) for i, s in enumerate(samples) if s in judged(samples)]
        for samples in (groups_and_scores(*pairs), groups_and_scores(*moved))
    )
    assert kept == kept_moved == [(i, n) for n, (i, _) in enumerate(pairs) if len(set(groups[i])) > 1]


def test_6_a_named_source_judges_alone() -> None:
    """Two right answers, of which one has the wrong form: their rewards for form differ."""
    combiner = combiner_of(*SOURCES, {**SOURCES[0], "name": "form", "weight": 0.5})
    samples = [
        replace(make_sample(group_id=0, sample_index=i), source_rewards=rewards)
        for i, rewards in enumerate([(1.0, 1.0), (1.0, 0.0)])
    ]
    assert [combiner.raw_reward(sample) for sample in samples] == [1.5, 1.0]
    assert [combiner.raw_reward(sample, "form") for sample in samples] == [1.0, 0.0]
    for source, kept in ((None, 2), ("form", 2), ("right", 0)):
        assert len(informative(samples, DynamicSamplingConfig(source=source), combiner)) == kept


class WithGroupsElsewhere(Ranks):
    """Another rank has these groups."""

    def __init__(self, *group_ids: int) -> None:
        self.group_ids = list(group_ids)

    def gather(self, items: list[Any]) -> list[Any]:
        return [*items, *self.group_ids]

    def sum_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        return {
            key: value + len(self.group_ids) if key == "groups" else value for key, value in numbers.items()
        }


def test_surplus_groups_are_the_last_of_all_ranks() -> None:
    ranks = WithGroupsElsewhere(1, 2, 9)
    samples = groups_and_scores((4, 1.0), (4, 0.0), (0, 1.0), (0, 0.0), (7, 1.0), (7, 0.0))
    assert first_groups(samples, 4, ranks) == samples[:4]  # 0, 1, 2 and 4
    assert first_groups(samples, 3, ranks) == samples[2:4]
    assert first_groups(samples, 100, ranks) == samples


def test_groups_are_counted_once() -> None:
    samples = groups_and_scores((4, 1.0), (4, 0.0), (0, 1.0))
    assert count_groups(samples, Ranks()) == 2
    assert count_groups(samples, WithGroupsElsewhere(1, 2, 9)) == 5
    assert count_groups([], Ranks()) == 0


class PromptBatches:
    """A source of groups that has these prompt batches."""

    def __init__(self, *batches: list[Sample]) -> None:
        self.batches = list(batches)
        self.steps: list[int] = []

    def next(self, step: int) -> list[Sample]:
        self.steps.append(step)
        return self.batches.pop(0)

    def drain_restarted(self) -> int:
        return 0

    def close(self) -> None: ...


class RewardCounts:
    """What a step asks of the reward client once rewards are there."""

    def __init__(self, unverified: int = 0) -> None:
        self.unverified = unverified
        self.checked: list[tuple[int, int]] = []

    def drain_unverified(self) -> int:
        return self.unverified

    def check(self, num_failed: int, num_samples: int) -> None:
        self.checked.append((num_failed, num_samples))
        if num_failed > 0.5 * num_samples:
            raise RewardFailure(f"{num_failed} of {num_samples}")


def collected_groups(
    source: PromptBatches, counts: Any, *, num_groups: int, ranks: Ranks | None = None, **algorithm: Any
) -> StepGroups:
    found = collect_groups(
        source,
        rollouts_module.Rewards(counts, combiner_of(*SOURCES)),
        AlgorithmConfig.model_validate({"advantage": "grpo", **algorithm}),
        ranks or Ranks(),
        step=5,
        num_groups=num_groups,
    )
    check_keys(found.metrics)
    return found


def ids(samples: list[Sample]) -> list[int]:
    return [sample.group_id for sample in samples]


def test_without_dynamic_sampling_a_step_has_one_prompt_batch() -> None:
    """Group 1 has lost a sample, and for a group estimator the other one with it."""
    source = PromptBatches(groups_and_scores((0, 1.0), (0, 1.0), (1, None), (1, 0.0)), [])
    counts = RewardCounts(unverified=3)
    found = collected_groups(source, counts, num_groups=2)
    assert source.steps == [5] and ids(found.samples) == [0, 0] and ids(found.sampled) == [0, 0, 1, 1]
    assert found.num_groups == 1
    assert found.metrics == {"reward/failed": 2.0, "reward/unverified": 3.0}
    assert counts.checked == [(1, 4)], "the one that could not be scored, not the one that is dropped with it"


def test_too_many_samples_without_a_score_end_the_run() -> None:
    source = PromptBatches(groups_and_scores((0, None), (0, None), (1, None), (1, 0.0)))
    with pytest.raises(RewardFailure, match="3 of 4"):
        collected_groups(source, RewardCounts(), num_groups=2)


def test_dynamic_sampling_takes_prompt_batches_until_there_are_enough_groups() -> None:
    """Two groups are wanted: the first batch has one whose rewards differ, the second has none and the third
    two, of which the last is left over. A fourth is not asked for.
    """
    source = PromptBatches(
        groups_and_scores((0, 1.0), (0, 1.0), (1, 1.0), (1, 0.0)),
        groups_and_scores((2, 0.0), (2, 0.0)),
        groups_and_scores((4, 1.0), (4, 0.0), (5, 0.0), (5, 1.0)),
        groups_and_scores((6, 1.0), (6, 0.0)),
    )
    found = collected_groups(source, RewardCounts(), num_groups=2, dynamic_sampling={"max_prompt_batches": 9})
    assert source.steps == [5, 5, 5]
    assert ids(found.samples) == [1, 1, 4, 4] and found.num_groups == 2
    assert ids(found.sampled) == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5], "dropped ones included"
    assert found.metrics == {
        "reward/failed": 0.0,
        "reward/unverified": 0.0,
        "rollout/prompt_batches": 3.0,
        "rollout/groups_in_range": 3.0,
    }


def test_dynamic_sampling_ends_with_max_prompt_batches_and_counts_the_groups_of_all_ranks() -> None:
    def equal() -> list[Sample]:
        return groups_and_scores((0, 1.0), (0, 1.0))

    source = PromptBatches(equal(), equal(), equal())
    found = collected_groups(source, RewardCounts(), num_groups=2, dynamic_sampling={"max_prompt_batches": 2})
    assert source.steps == [5, 5] and found.samples == [] and found.num_groups == 0
    source = PromptBatches(equal(), equal())
    found = collected_groups(
        source,
        RewardCounts(),
        num_groups=2,
        ranks=WithGroupsElsewhere(7),
        dynamic_sampling={"max_prompt_batches": 2},
    )
    assert source.steps == [5, 5] and found.num_groups == 1, "one group is on another rank"
