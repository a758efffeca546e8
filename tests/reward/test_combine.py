"""One score out of several raw rewards."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayrlhf.config.reward import RewardConfig
from rayrlhf.reward.combine import RewardCombiner, overlong_share
from rayrlhf.samples import Sample
from tests.samples import make_sample

LIMIT = 10  # tokens of the longest response


def alone(values: Tensor) -> Tensor:
    return values.clone()


def combiner(*sources: dict[str, Any], **config: Any) -> RewardCombiner:
    filled = [{"type": "function", "function": "rewards:length", **source} for source in sources]
    return RewardCombiner(RewardConfig.model_validate({"sources": filled, **config}), response_limit=LIMIT)


def sample(*rewards: float | None, num_tokens: int = 2, truncated: bool = False) -> Sample:
    made = make_sample([7] * num_tokens, truncated=truncated, score=None)
    return replace(made, source_rewards=rewards)


def scores(by: RewardCombiner, *samples: Sample, **options: Any) -> list[float | None]:
    combined = by.combine(samples, alone, **options)
    assert [replace(after, score=None) for after in combined] == list(samples), "nothing else may change"
    return [after.score for after in combined]


def test_sources_are_weighted_and_added() -> None:
    by = combiner({"weight": 0.5}, {"weight": -0.25})
    assert scores(by, sample(1.0, 10.0), sample(2.0, -4.0)) == [0.5 - 2.5, 1.0 + 1.0]


def test_a_sample_with_a_failed_source_has_no_score() -> None:
    by = combiner({}, {"normalize": True}, truncation_penalty=-1.0)
    assert scores(by, sample(1.0, None), sample(None, 5.0, truncated=True), sample(2.0, 3.0)) == [
        None,
        None,
        2.0,  # 3 is the only value that counts for source 1: it is its own mean
    ]


def test_an_old_score_does_not_stay_on_a_failed_sample() -> None:
    [after] = combiner({}).combine([replace(sample(None), score=9.0)], alone)
    assert after.score is None


def test_the_sum_is_clipped_not_its_parts() -> None:
    by = combiner({}, {}, clip=[-2, 3])
    assert scores(by, sample(9.0, -8.0), sample(-9.0, 0.0), sample(9.0, 0.0)) == [1.0, -2.0, 3.0]


def test_a_truncated_response_gets_the_penalty_instead() -> None:
    asked = sample(5.0), sample(5.0, truncated=True)
    assert scores(combiner({}, truncation_penalty=-1.0), *asked) == [5.0, -1.0]
    assert scores(combiner({}), *asked) == [5.0, 5.0], "null leaves it its own"


@pytest.mark.parametrize(
    ("num_tokens", "share"),
    # L = 10, b = 4: nothing up to 6 tokens, then a quarter per token, full at 10 and beyond.
    [(0, 0.0), (6, 0.0), (7, 0.25), (8, 0.5), (9, 0.75), (10, 1.0), (11, 1.0)],
)
def test_the_overlong_penalty_grows_over_its_buffer(num_tokens: int, share: float) -> None:
    assert overlong_share(num_tokens, LIMIT, 4) == share
    by = combiner({}, overlong={"buffer_tokens": 4, "factor": 2.0})
    assert scores(by, sample(1.0, num_tokens=num_tokens)) == [1.0 - 2.0 * share]


def test_penalties_in_their_order() -> None:
    by = combiner({}, overlong={"buffer_tokens": 4}, truncation_penalty=-0.5, clip=[-0.75, 1])
    # 0 - 1 is clipped; where the response was cut off, the truncation penalty stands in for all of it.
    assert scores(by, sample(0.0, num_tokens=10), sample(0.0, num_tokens=10, truncated=True)) == [
        -0.75,
        -0.5,
    ]


def test_normalisation_takes_the_batch_in_first_and_weighs_afterwards() -> None:
    by = combiner({"normalize": True, "weight": 3.0}, {})
    # 1 and 3: mean 2, population deviation 1.
    assert scores(by, sample(1.0, 0.0), sample(3.0, 10.0)) == pytest.approx([-3.0, 13.0])
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
    expected = [3 * 1 / 5**0.5, 3 * 3 / 5**0.5]
    assert scores(by, sample(5.0, 0.0), sample(7.0, 0.0)) == pytest.approx(expected)


def test_evaluations_are_all_on_the_raw_scale() -> None:
    by = combiner({"normalize": True})
    assert scores(by, sample(4.0), normalize=False) == [4.0]
    scores(by, sample(1.0), sample(3.0))
    before = by.state_dict()

    def no_collective(values: Tensor) -> Tensor:
        raise AssertionError("evaluation must not wait for other ranks here")

    [after] = by.combine([sample(4.0)], no_collective, normalize=False)
    assert after.score == 4.0
    assert by.state_dict() == before


def test_no_samples_at_all() -> None:
    by = combiner({"normalize": True}, {})
    assert by.combine([], alone) == []
    assert scores(by, sample(None, 1.0)) == [None]
    assert by.source_means([], alone) == {}


def test_ranks_normalise_alike_and_as_one_would() -> None:
    """Two ranks in two threads, one of them without a sample in the second step."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    rng = np.random.default_rng(0)
    rewards = rng.normal(3.0, 2.0, size=(9, 2))
    shares = [[rewards[:4], rewards[7:]], [rewards[4:7], rewards[:0]]]  # [rank][step]
    barrier, slots = Barrier(2), [torch.zeros(0)] * 2

    def train(rank: int) -> tuple[list[float | None], dict[str, Any], dict[str, float]]:
        def sum_over_ranks(values: Tensor) -> Tensor:
            slots[rank] = values
            barrier.wait(10)
            total = slots[0] + slots[1]
            barrier.wait(10)
            return total

        by = combiner({"normalize": True, "name": "a"}, {"normalize": True, "weight": 0.5, "name": "b"})
        steps = [[sample(*row) for row in share.tolist()] for share in shares[rank]]
        found = [after.score for step in steps for after in by.combine(step, sum_over_ranks)]
        return found, by.state_dict(), by.source_means([s for step in steps for s in step], sum_over_ranks)

    with ThreadPoolExecutor(2) as threads:
        (found, state, means), (other, other_state, other_means) = threads.map(train, range(2))
    assert state == other_state and means == other_means
    assert means == pytest.approx(
        {"reward/source/a": rewards[:, 0].mean(), "reward/source/b": rewards[:, 1].mean()}
    )
    first = rewards[:7]
    expected = ((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-8)) @ [1.0, 0.5]
    assert [*found[:4], *other] == pytest.approx(expected.tolist())
    later = ((rewards[7:] - rewards.mean(0)) / np.sqrt(rewards.var(0) + 1e-8)) @ [1.0, 0.5]
    assert found[4:] == pytest.approx(later.tolist())


def test_means_of_raw_rewards_leave_failures_out() -> None:
    by = combiner({"name": "judge", "normalize": True, "weight": 9.0}, {}, {})
    means = by.source_means([sample(1.0, None, None), sample(2.0, 4.0, None)], alone)
    assert means == {"reward/source/judge": 1.5, "reward/source/reward1": 4.0}


def test_a_saved_state_goes_on_bit_by_bit() -> None:
    sources = [{"normalize": True, "name": "a"}, {"name": "b"}, {"normalize": True, "name": "c"}]
    rows = np.random.default_rng(1).normal(size=(20, 3)).tolist()
    whole, first, second = combiner(*sources), combiner(*sources), combiner(*sources)
    steps = [[sample(*row) for row in rows[i : i + 5]] for i in range(0, 20, 5)]
    wanted = [scores(whole, *step) for step in steps]
    for step in steps[:2]:
        scores(first, *step)
    state = json.loads(json.dumps(first.state_dict()))
    assert list(state) == ["a", "c"] and set(state["a"]) == {"count", "mean", "m2"}
    second.load_state_dict(state)
    assert [scores(second, *step) for step in steps[2:]] == wanted[2:]


def test_a_state_from_before_a_source_was_normalised() -> None:
    by = combiner({"normalize": True, "name": "new"}, {"normalize": True, "name": "old"})
    by.load_state_dict({"old": {"count": 2.0, "mean": 2.0, "m2": 2.0}, "gone": {}})
    assert by.state_dict()["old"] == {"count": 2.0, "mean": 2.0, "m2": 2.0}
    assert by.state_dict()["new"]["count"] == 0.0
    # new: one value has no deviation. old: 1, 3 and now 5: mean 3, variance (4 + 0 + 4) / 3.
    assert scores(by, sample(4.0, 5.0)) == pytest.approx([0.0 + 2.0 / (8 / 3) ** 0.5])


def test_a_score_too_large_for_float32_has_failed() -> None:
    """A reward within its bound, 1e18, times its weight: an advantage's square would be infinite."""
    assert scores(combiner({"weight": 1e3}), sample(1e18), sample(1e14)) == [None, 1e17]
    assert scores(combiner({"weight": 1e3}, clip=[-5.0, 5.0]), sample(1e18)) == [5.0]
