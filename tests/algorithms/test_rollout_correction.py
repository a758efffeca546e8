"""Rollout correction: weights by hand for every mode and level, float64 loops, garbage, and packing."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.algorithms.registry import ROLLOUT_CORRECTIONS, WEIGHT_LEVELS
from rayrlhf.algorithms.rollout_correction import rollout_weights
from rayrlhf.batch import cu_seqlens_of
from tests.algorithms.measured import numbers, totals

NAN, INF = math.nan, math.inf

# A: ratios 2 and 8 around a tool token; B: a padded row; C: one policy token; D: 1/2, 1/2 and 2.
#                |-------- A --------|  |--- B --|  |-- C --|  |------- D -------|
RATIOS = np.array([NAN, 2.0, NAN, 8.0, NAN, NAN, NAN, 1.5, NAN, 0.5, 0.5, 2.0])
LENGTHS = [4, 2, 2, 4]
MASK = torch.tensor(~np.isnan(RATIOS)).float()
OLD = torch.where(MASK > 0, -2.0, INF)
ROLLOUT = torch.where(MASK > 0, -2.0 - torch.tensor(RATIOS).log().float(), NAN)

# On the policy tokens, in order: A, A, C, D, D, D. Sequences: A 2·8 = 16, C 1.5, D ½·½·2 = ½; geometric
# means: A 4, C 1.5, D ½^⅓.
ROOT = 0.7937005
RAW = {
    "token": [2, 8, 1.5, 0.5, 0.5, 2],
    "sequence": [16, 16, 1.5, 0.5, 0.5, 0.5],
    "geometric": [4, 4, 1.5, ROOT, ROOT, ROOT],
}
BY_HAND: dict[tuple[str | None, str], tuple[list[float], float]] = {  # weights, tokens that were changed
    (None, "token"): ([1] * 6, 0),
    (None, "sequence"): ([1] * 6, 0),
    (None, "geometric"): ([1] * 6, 0),
    ("truncate", "geometric"): ([1.75, 1.75, 1.5, ROOT, ROOT, ROOT], 2),
    ("mask", "geometric"): ([0, 0, 1.5, ROOT, ROOT, ROOT], 2),
    ("truncate", "token"): ([1.75, 1.75, 1.5, 0.5, 0.5, 1.75], 3),  # at most 1.75
    ("truncate", "sequence"): ([1.75, 1.75, 1.5, 0.5, 0.5, 0.5], 2),
    ("mask", "token"): ([2, 0, 1.5, 0, 0, 2], 3),  # 0.75 .. 2.5; the weight itself stays inside
    ("mask", "sequence"): ([0, 0, 1.5, 0, 0, 0], 5),
}
BOUNDS = {None: (0.0, 1.0), "truncate": (0.0, 1.75), "mask": (0.75, 2.5)}


def weights_of(
    old: Tensor = OLD, rollout: Tensor = ROLLOUT, mask: Tensor = MASK, **overrides: Any
) -> tuple[Tensor, dict[str, float]]:
    """Weights, and metrics as sums."""
    chosen: dict[str, Any] = {"mode": "truncate", "level": "token", "low": 0.0, "high": 2.0} | overrides
    weights, metrics = rollout_weights(old, rollout, mask, cu_seqlens_of(LENGTHS), **chosen)
    return weights, totals(metrics, float(mask.sum()))


@pytest.mark.parametrize(("mode", "level"), BY_HAND)
def test_by_hand(mode: str | None, level: str) -> None:
    low, high = BOUNDS[mode]
    weights, metrics = weights_of(mode=mode, level=level, low=low, high=high)
    expected, changed = BY_HAND[mode, level]
    assert weights[MASK > 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert weights[MASK == 0].tolist() == [0.0] * 6
    assert metrics == pytest.approx(
        {
            "loss/is_weight_mean": sum(RAW[level]),  # before the bound, whatever the mode
            "loss/is_weight_max": max(RAW[level]),
            "loss/is_masked_fraction": changed,
            "rollout/logprob_diff_mean": math.log(2 * 8 * 1.5 * 2 * 2 * 2),
            "rollout/logprob_diff_max": math.log(8),
        },
        rel=1e-5,
    )


def test_every_mode_and_level_has_expected_numbers() -> None:
    assert {mode for mode, _ in BY_HAND} == {None, *ROLLOUT_CORRECTIONS}
    assert {level for _, level in BY_HAND} == WEIGHT_LEVELS.keys()
    assert len(BY_HAND) == (1 + len(ROLLOUT_CORRECTIONS)) * len(WEIGHT_LEVELS)


@pytest.mark.parametrize(("mode", "level"), BY_HAND)
def test_an_engine_that_agrees_is_left_alone(mode: str | None, level: str) -> None:
    old = torch.where(MASK > 0, -1.25, NAN)
    weights, metrics = weights_of(old, old.clone(), mode=mode, level=level, high=1.0)
    assert torch.equal(weights, MASK)
    assert metrics == {
        "loss/is_weight_mean": 6.0,
        "loss/is_weight_max": 1.0,
        "loss/is_masked_fraction": 0.0,
        "rollout/logprob_diff_mean": 0.0,
        "rollout/logprob_diff_max": 0.0,
    }


@pytest.mark.parametrize(("mode", "level"), BY_HAND)
def test_empty_mask(mode: str | None, level: str) -> None:
    weights, metrics = weights_of(mask=torch.zeros(12), mode=mode, level=level)
    assert weights.tolist() == [0.0] * 12
    assert set(metrics.values()) == {0.0}


def test_the_log_weight_is_clamped_after_the_sum() -> None:
    # A: 30 - 15 = 15 stays 15, not 20 - 15 = 5. C: 25 -> 20. D: 3 · (-10) = -30 -> -20.
    log_ratios = torch.tensor([0.0, 30.0, 0.0, -15.0, 0.0, 0.0, 0.0, 25.0, 0.0, -10.0, -10.0, -10.0])
    weights, _ = weights_of(log_ratios, torch.zeros(12), level="sequence", high=INF)
    assert weights[MASK > 0].log().tolist() == pytest.approx([15, 15, 20, -20, -20, -20], rel=1e-5)
    weights, _ = weights_of(log_ratios, torch.zeros(12), level="token", high=INF)
    assert weights[MASK > 0].log().tolist() == pytest.approx([20, -15, 20, -10, -10, -10], rel=1e-5)


def test_a_weight_that_is_nan_does_not_learn_in_mask_mode() -> None:
    rollout = ROLLOUT.clone()
    rollout[1] = NAN
    weights, metrics = weights_of(rollout=rollout, mode="mask", low=0.5, high=10.0)
    assert weights[MASK > 0].tolist() == pytest.approx([0, 8, 1.5, 0.5, 0.5, 2], rel=1e-5)
    assert metrics["loss/is_masked_fraction"] == 1.0
    assert math.isnan(metrics["loss/is_weight_mean"])  # and the metrics do not hide it


def test_weights_are_fp32_constants() -> None:
    old = OLD.to(torch.bfloat16).requires_grad_()
    weights, metrics = rollout_weights(
        old, ROLLOUT, MASK, cu_seqlens_of(LENGTHS), mode="truncate", level="token", low=0.0, high=2.0
    )
    assert {weights.dtype, *(number.dtype for number in numbers(metrics))} == {torch.float32}
    assert not weights.requires_grad and not any(number.requires_grad for number in numbers(metrics))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mode": "clip"}, "mode='clip' is not one of truncate, mask, or None"),
        ({"level": "word"}, "level='word' is not one of token, sequence, geometric"),
        ({"low": 0.5}, r"low=0\.5 has no effect with mode=truncate"),
        ({"high": 0.5}, r"high=0\.5, but wanted 0 <= low <= 1 <= high"),
        ({"mode": "mask", "low": 1.5, "high": 2.0}, r"low=1\.5"),
        ({"mode": "mask", "low": -0.5}, r"low=-0\.5"),
        ({"mode": "mask", "low": NAN}, "low=nan"),
    ],
)
def test_errors(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of(**overrides)


def loops(
    old: np.ndarray,
    rollout: np.ndarray,
    mask: np.ndarray,
    lengths: list[int],
    mode: str | None,
    level: str,
    low: float,
    high: float,
) -> tuple[list[float], dict[str, float]]:
    """From the definition, as quotients of probabilities, one sequence and one token at a time."""
    weights, raws, changed, differences = [0.0] * mask.size, [0.0], 0, [0.0]
    start = 0
    for length in lengths:
        policy = [t for t in range(start, start + length) if mask[t]]
        ratios = [math.exp(old[t]) / math.exp(rollout[t]) for t in policy]
        for t, ratio in zip(policy, ratios, strict=True):
            product = math.prod(ratios)
            mean = product ** (1 / len(ratios))
            raw = {"token": ratio, "sequence": product, "geometric": mean}[level]
            raw = min(max(raw, math.exp(-20)), math.exp(20))
            weights[t] = raw
            if mode is None:
                weights[t] = 1.0
            elif mode == "truncate" and raw > high:
                weights[t], changed = high, changed + 1
            elif mode == "mask" and not low <= raw <= high:
                weights[t], changed = 0.0, changed + 1
            raws.append(raw)
            differences.append(abs(old[t] - rollout[t]))
        start += length
    return weights, {
        "loss/is_weight_mean": sum(raws),
        "loss/is_weight_max": max(raws),
        "loss/is_masked_fraction": changed,
        "rollout/logprob_diff_mean": sum(differences),
        "rollout/logprob_diff_max": max(differences),
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from([None, *ROLLOUT_CORRECTIONS]),
    level=st.sampled_from(sorted(WEIGHT_LEVELS)),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=6),
    drift=st.sampled_from([0.01, 0.3, 2.0]),
    bounds=st.sampled_from([(0.5, 5.0), (0.9, 1.1), (0.0, 2.0)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_match_float64_loops_under_any_packing(
    mode: str | None,
    level: str,
    lengths: list[int],
    drift: float,
    bounds: tuple[float, float],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    low, high = (0.0, bounds[1]) if mode == "truncate" else bounds
    total = sum(lengths)
    mask = rng.random(total) < rng.choice([0.0, 0.6, 1.0])
    rollout = rng.normal(-2, 1, total).astype(np.float32)
    old = (rollout + rng.normal(0, drift, total)).astype(np.float32)
    expected, sums = loops(
        old.astype(np.float64), rollout.astype(np.float64), mask, lengths, mode, level, low, high
    )

    garbage = np.float32(rng.choice([NAN, INF, -INF]))
    t_old, t_rollout = (torch.tensor(np.where(mask, x, garbage)) for x in (old, rollout))
    t_mask = torch.tensor(mask).float()

    def run(part: list[int]) -> tuple[Tensor, Metrics]:
        picks = torch.cat([torch.arange(total).split(lengths)[i] for i in part])
        cu_seqlens = cu_seqlens_of([lengths[i] for i in part])
        return rollout_weights(
            t_old[picks],
            t_rollout[picks],
            t_mask[picks],
            cu_seqlens,
            mode=mode,
            level=level,
            low=low,
            high=high,
        )

    weights, metrics = run(list(range(len(lengths))))
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-5)
    assert totals(metrics, float(mask.sum())) == pytest.approx(sums, rel=1e-5, abs=1e-5)

    # One sequence at a time: the same weights, and the metrics add up (the maxima are the largest).
    alone = [run([i]) for i in range(len(lengths))]
    torch.testing.assert_close(torch.cat([w for w, _ in alone]), weights, rtol=1e-6, atol=1e-6)
    added = reduce(add, [part for _, part in alone], Metrics())
    assert totals(added, float(mask.sum())) == pytest.approx(sums, rel=1e-5, abs=1e-5)
