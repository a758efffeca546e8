"""The learning rate of every step, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config.train import TrainConfig
from rayrlhf.train.learner import learning_rate


def rates(base: float, steps: int, **fields: Any) -> list[float]:
    train = TrainConfig.model_validate({"num_steps": steps, **fields})
    return [learning_rate(base, train, step) for step in range(steps)]


def test_constant_from_the_first_step() -> None:
    assert rates(0.5, 3) == [0.5, 0.5, 0.5]


def test_warm_up_reaches_the_full_rate_in_its_last_step() -> None:
    # (step + 1)/4 of the rate: the first step already learns something.
    assert rates(0.8, 6, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert rates(0.8, 4, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    "schedule, warmup_steps, min_lr_ratio, expected",
    [
        # Decay over 4 steps, progress 0, 1/4, 1/2, 3/4; it would be complete at the step after the last.
        ("linear", 0, 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 0, 0.2, [1.0, 0.8, 0.6, 0.4]),  # 0.2 + 0.8 · remaining
        ("linear", 2, 0.0, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        # (1 + cos(π · progress))/2 at 45° steps: cos 45° = 0.70710678
        ("cosine", 0, 0.0, [1.0, 0.85355339, 0.5, 0.14644661]),
        ("cosine", 0, 0.5, [1.0, 0.92677670, 0.75, 0.57322330]),
        ("cosine", 1, 0.0, [1.0, 1.0, 0.85355339, 0.5, 0.14644661]),
    ],
)
def test_decay(schedule: str, warmup_steps: int, min_lr_ratio: float, expected: list[float]) -> None:
    found = rates(
        1.0, len(expected), lr_schedule=schedule, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio
    )
    assert found == pytest.approx(expected)
    scaled = rates(
        3e-6, len(expected), lr_schedule=schedule, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio
    )
    assert scaled == pytest.approx([3e-6 * rate for rate in expected])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_end_of_the_decay(schedule: str) -> None:
    train = TrainConfig.model_validate({"num_steps": 10, "lr_schedule": schedule, "min_lr_ratio": 0.1})
    assert learning_rate(2.0, train, 10) == pytest.approx(0.2)


def test_a_rate_of_zero_stays_zero() -> None:
    assert rates(0.0, 3, warmup_steps=2, lr_schedule="cosine") == [0.0] * 3


def test_a_run_that_is_all_warm_up_has_no_decay_to_divide_by() -> None:
    train = TrainConfig.model_validate({"num_steps": 2, "warmup_steps": 2, "lr_schedule": "linear"})
    assert learning_rate(1.0, train, 2) == 1.0


def test_16_the_actors_warm_up_begins_when_the_critics_ends() -> None:
    """10 warm-up steps to 1e-6 after 20 in which only the critic learns, of 100: 1e-7 and not 9.7e-7."""
    train = TrainConfig.model_validate({"num_steps": 100, "warmup_steps": 10, "lr_schedule": "cosine"})
    found = [learning_rate(1e-6, train, step, first_step=20) for step in range(20, 100)]
    assert found[:10] == pytest.approx([1e-7 * (i + 1) for i in range(10)])
    # The decay takes the 70 steps that are left: it is half done at step 65, and done at 100.
    assert found[65 - 20] == pytest.approx(5e-7)
    assert learning_rate(1e-6, train, 100, first_step=20) == pytest.approx(0.0, abs=1e-15)
    assert found == [
        learning_rate(1e-6, train.model_copy(update={"num_steps": 80}), step) for step in range(80)
    ]
