"""Which samples are worth training on; other ranks' groups are put in by hand."""

from __future__ import annotations

import pytest

from rayrlhf.config.algorithm import DynamicSamplingConfig
from rayrlhf.loops import dynamic_sampling
from rayrlhf.loops.dynamic_sampling import count_groups, first_groups, in_range, scored_groups
from rayrlhf.samples import Sample
from tests.samples import make_sample


def groups_and_scores(*pairs: tuple[int, float | None]) -> list[Sample]:
    return [make_sample(group_id=group, score=score) for group, score in pairs]


def test_unscored_samples_are_dropped() -> None:
    samples = groups_and_scores((0, 1.0), (1, None), (2, 0.0))
    assert scored_groups(samples, needs_group=False) == [samples[0], samples[2]]


def test_the_last_of_a_group_has_nothing_to_be_compared_with() -> None:
    samples = groups_and_scores((4, 1.0), (4, None), (0, None), (0, None), (2, 1.0), (2, 0.0), (2, None))
    assert scored_groups(samples, needs_group=True) == [samples[4], samples[5]]
    assert scored_groups(samples[:4], needs_group=True) == []
    assert scored_groups([], needs_group=True) == []


def test_groups_that_teach_nothing_are_left_out() -> None:
    samples = groups_and_scores(
        (0, 0.0), (0, 0.0), (1, 1.0), (1, 0.0), (2, 1.0), (2, 1.0), (3, 0.5), (3, 0.7)
    )
    kept = in_range(samples, DynamicSamplingConfig(low=0.0, high=1.0))
    assert kept == [samples[2], samples[3], samples[6], samples[7]]
    # Means are 0, 0.5, 1 and 0.6; both ends are outside.
    assert in_range(samples, DynamicSamplingConfig(low=0.5, high=1.0)) == samples[6:]


def test_surplus_groups_are_the_last_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = [1, 2, 9]
    monkeypatch.setattr(dynamic_sampling.collectives, "gather_lists", lambda mine: [*mine, *elsewhere])
    samples = groups_and_scores((4, 1.0), (4, 0.0), (0, 1.0), (0, 0.0), (7, 1.0), (7, 0.0))
    assert first_groups(samples, 4) == samples[:4]  # 0, 1, 2 and 4
    assert first_groups(samples, 3) == samples[2:4]
    assert first_groups(samples, 100) == samples


def test_groups_are_counted_once() -> None:
    assert count_groups(groups_and_scores((4, 1.0), (4, 0.0), (0, 1.0))) == 2
    assert count_groups([]) == 0
