"""A push that went wrong ends the run; precision and learning do not."""

from __future__ import annotations

import math

import pytest

from rayrlhf.policy.push_check import MismatchAlarm, PushCheck, WeightsDiffer


def after(differences: list[float], *, limit: float | None = 0.1, is_stale: bool = False) -> PushCheck:
    check = PushCheck("some/model", limit)
    for step, difference in enumerate(differences):
        check = check.after(difference, policy_version=step, is_stale=is_stale)
    return check


@pytest.mark.parametrize(
    "differences",
    [
        [1.5e-6, 1.77],  # tiny Qwen2-MoE, whose experts came in another layout
        [0.05, 2.08],
        [1.77],  # after a resume, which pushes before the first step
        [0.02, 0.03, math.nan],
    ],
)
def test_17a_a_jump_at_a_push_stops_the_run(differences: list[float]) -> None:
    with pytest.raises(WeightsDiffer) as caught:
        after(differences)
    text = str(caught.value)
    assert f"policy version {len(differences) - 1}" in text and "some/model" in text
    assert f"{differences[-1]:.3g} nats" in text and "transformers 5." in text and "vllm" in text
    assert "max_logprob_jump=0.1" in text


@pytest.mark.parametrize(
    ("differences", "is_stale"),
    [
        ([1e-6, 1e-5, 9e-2], False),  # over tenfold, and too little to matter
        ([0.02, 0.09, 0.3, 0.9], False),  # bf16, and a policy that grows sharper
        ([0.3, 2.9], False),
        ([1e-6, 0.4, 0.02, 0.7], True),  # tokens of older weights: the difference is what the updates changed
    ],
)
def test_17a_precision_and_staleness_do_not(differences: list[float], is_stale: bool) -> None:
    assert after(differences, is_stale=is_stale).last == differences[-1]


def test_without_a_limit_nothing_does() -> None:
    assert after([1e-6, 5.0], limit=None).last == 5.0


def test_the_alarm_speaks_when_the_band_is_left_and_entered() -> None:
    alarm, said = MismatchAlarm(limit=0.05), []
    for difference, is_stale in [(0.01, False), (0.06, True), (0.06, False), (0.2, False), (0.02, False)]:
        alarm, text = alarm.after(difference, is_stale=is_stale)
        said.append(text)
    assert [text is not None for text in said] == [False, False, True, False, True]
    assert said[2] is not None and "rollout/logprob_diff_mean is 0.06 nats per token, above" in said[2]
    assert said[4] is not None and "back within rollout.weight_sync.logprob_diff_alarm=0.05" in said[4]
    assert MismatchAlarm(limit=0.05).after(math.nan, is_stale=False)[0].is_on
    assert MismatchAlarm(limit=None).after(9.0, is_stale=False) == (MismatchAlarm(None), None)
