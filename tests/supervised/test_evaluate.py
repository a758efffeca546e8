"""Means over held-out samples, weighted as the objective weighs them, whatever rank has measured them."""

from __future__ import annotations

import math

import pytest

from rayrlhf.observe.statistics import calibration_error
from rayrlhf.supervised.evaluate import evaluation_of, is_better


def test_means_are_ratios_of_sums_over_all_ranks() -> None:
    # Row 1: 4 tokens with a loss of 2 each; rows 0 and 2: one token, losses 5 and 9. Row 2 has no hard label.
    per_rank = [
        {"row_ids": [1], "eval/loss": [[8.0, 4.0]], "reward/accuracy": [[1.0, 1.0]]},
        {
            "row_ids": [2, 0],
            "eval/loss": [[9.0, 1.0], [5.0, 1.0]],
            "reward/accuracy": [[0.0, 0.0], [0.0, 1.0]],
        },
    ]
    result = evaluation_of(per_rank)
    assert result.metrics["eval/loss"] == pytest.approx(22 / 6)
    assert result.metrics["eval/accuracy"] == pytest.approx(1 / 2)
    assert result.metrics["eval/samples"] == 3
    assert result.metrics["eval/loss_ci_low"] <= 22 / 6 <= result.metrics["eval/loss_ci_high"]
    assert result.rows == [
        {"row_id": 0, "loss": 5.0, "accuracy": 0.0},
        {"row_id": 1, "loss": 2.0, "accuracy": 1.0},
        {"row_id": 2, "loss": 9.0},
    ]
    assert "eval/calibration_error" not in result.metrics


def test_a_quantity_that_no_sample_has_is_left_out() -> None:
    per_rank = [{"row_ids": [0], "eval/loss": [[1.0, 1.0]], "reward/accuracy_bad": [[0.0, 0.0]]}]
    assert "eval/accuracy_bad" not in evaluation_of(per_rank).metrics


def test_margins_have_a_calibration_error() -> None:
    per_rank = [{"row_ids": [0], "eval/loss": [[1.0, 1.0]], "reward/margin": [[math.log(3), 1.0]]}]
    # σ(ln 3) = 3/4 sure, and right.
    assert evaluation_of(per_rank).metrics["eval/calibration_error"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("loss", 1.0),
        ("calibration_error", 1.0),
        ("divergence", 1.0),
        ("rejected", 1.0),
        ("undesirable", 1.0),
        ("accuracy", 3.0),
        ("margin", 3.0),
        ("chosen", 3.0),
    ],
)
def test_which_way_is_up(metric: str, better: float) -> None:
    assert is_better(metric, better, 2.0)
    assert not is_better(metric, 4.0 - better, 2.0)
    assert not is_better(metric, 2.0, 2.0)


def test_calibration_error_by_hand() -> None:
    # All at 3/4: of four, three right: perfectly calibrated. At even odds and half right too.
    sure = math.log(3)
    assert calibration_error([sure, sure, sure, -sure]) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error([sure, -sure]) == pytest.approx(1 / 4)
    # Two bins: a half of the samples is off by 1/4, the other half (very sure, always right) by nearly 0.
    assert calibration_error([sure, -sure, 50.0, 50.0]) == pytest.approx(1 / 8)
    assert math.isnan(calibration_error([]))
