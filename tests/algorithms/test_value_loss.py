"""The value loss and the explained variance: numbers by hand, float64 loops, and garbage outside the mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.aggregate import aggregate
from rayrlhf.algorithms.metrics import ExplainedVariance
from rayrlhf.algorithms.value_loss import explained_variance, value_loss
from rayrlhf.batch import cu_seqlens_of
from tests.algorithms.measured import totals

NAN, INF = math.nan, math.inf

# Two sequences with a padded row (positions 4, 5) between them; the second has one policy token.
MASK = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
VALUES = torch.tensor([NAN, 3.0, 3.0, 2.2, INF, NAN, NAN, 1.0])
OLD_VALUES = torch.tensor([INF, 2.0, 2.0, 2.0, NAN, INF, NAN, 2.0])
RETURNS = torch.tensor([NAN, 1.0, 3.2, 1.0, NAN, NAN, INF, 0.5])


def test_clipped_by_hand() -> None:
    values = VALUES.clone().requires_grad_()
    loss, metrics = value_loss(values, OLD_VALUES, RETURNS, MASK, clip=0.5)
    loss.sum().backward()
    # V=3   R=1   bound 2.5: max(2² = 4, 1.5² = 2.25)       = 4      -> 2       gradient V - R = 2
    # V=3   R=3.2 bound 2.5: max(0.2² = 0.04, 0.7² = 0.49)  = 0.49   -> 0.245   the bound decides: gradient 0
    # V=2.2 R=1   inside:    1.2²                           = 1.44   -> 0.72    gradient 1.2
    # V=1   R=0.5 bound 1.5: max(0.5² = 0.25, 1² = 1)       = 1      -> 0.5     the bound decides: gradient 0
    assert loss.tolist() == pytest.approx([0, 2.0, 0.245, 0.72, 0, 0, 0, 0.5], rel=1e-5)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0, 2.0, 0, 1.2, 0, 0, 0, 0], rel=1e-5)
    # Sums: two clipped; values 3+3+2.2+1; returns 1+3.2+1+0.5
    by_hand = {"loss/value_clip_fraction": 2.0, "loss/value": 9.2, "loss/return": 5.7}
    assert totals(metrics, 4) == pytest.approx(by_hand, rel=1e-6)


def test_unclipped_by_hand() -> None:
    values = VALUES.clone().requires_grad_()
    loss, metrics = value_loss(values, OLD_VALUES, RETURNS, MASK, clip=None)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0, 2.0, 0.02, 0.72, 0, 0, 0, 0.125], rel=1e-5)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0, 2.0, -0.2, 1.2, 0, 0, 0, 0.5], rel=1e-5)
    assert totals(metrics, 4)["loss/value_clip_fraction"] == 0.0


def test_empty_mask() -> None:
    values = VALUES.clone().requires_grad_()
    loss, metrics = value_loss(values, OLD_VALUES, RETURNS, torch.zeros(8), clip=0.2)
    loss.sum().backward()
    assert values.grad is not None
    assert loss.tolist() == values.grad.tolist() == [0.0] * 8
    assert set(totals(metrics, 0).values()) == {0.0}
    assert metrics.results() == {}, "a mean over nothing is no 0"
    assert explained_variance(VALUES, RETURNS, torch.zeros(8)).sums == (0.0,) * 5


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=6),
    clip=st.sampled_from([None, 0.05, 0.2, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_float64_loops_under_any_packing(lengths: list[int], clip: float | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    mask = rng.random(total) < rng.choice([0.0, 0.6, 1.0])
    old, returns = (rng.normal(size=total).astype(np.float32) for _ in range(2))
    values = (old + rng.normal(0, 0.3, total)).astype(np.float32)
    losses, gradients, num_clipped = np.zeros(total), np.zeros(total), 0
    for t in np.flatnonzero(mask):
        v, v_old, r = float(values[t]), float(old[t]), float(returns[t])
        bound = v if clip is None else min(v_old + clip, max(v_old - clip, v))
        decided = (bound - r) ** 2 > (v - r) ** 2
        losses[t] = max((v - r) ** 2, (bound - r) ** 2) / 2
        gradients[t] = 0.0 if decided else v - r
        num_clipped += decided

    t_mask = torch.tensor(mask).float()
    leaf, t_old, t_returns = (
        torch.tensor(np.where(mask, x, np.float32(NAN))) for x in (values, old, returns)
    )
    leaf.requires_grad_()
    loss, metrics = value_loss(leaf, t_old, t_returns, t_mask, clip=clip)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), losses, atol=1e-5, rtol=1e-5)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, gradients, atol=1e-5, rtol=1e-5)
    assert totals(metrics, float(mask.sum()))["loss/value_clip_fraction"] == num_clipped

    # The objective of any split of the sequences over micro-batches is the mean of the loops' losses.
    def share(positions: Tensor, part: list[int]) -> float:
        rows = (x.detach()[positions] for x in (leaf, t_old, t_returns, t_mask))
        part_loss, _ = value_loss(*rows, clip=clip)
        cu_seqlens = cu_seqlens_of([lengths[i] for i in part])
        return aggregate(
            "token_mean",
            part_loss,
            t_mask[positions],
            cu_seqlens,
            global_tokens=float(mask.sum()),
            global_sequences=1.0,
            constant_length=1.0,
        ).item()

    ranges = torch.arange(total).split(lengths)
    order = rng.permutation(len(lengths)).tolist()
    parts = [part for part in (order[::2], order[1::2]) if part]
    objective = sum(share(torch.cat([ranges[i] for i in part]), part) for part in parts)
    assert objective == pytest.approx(losses.sum() / max(1, mask.sum()), abs=1e-5)


def explained(values: list[float], returns: list[float]) -> float:
    tensors = torch.tensor(values), torch.tensor(returns)
    return explained_variance(*tensors, torch.ones(len(values))).result()


def test_explained_variance_by_hand() -> None:
    returns = [1.0, 2.0, 3.0, 4.0]  # variance 1.25
    assert explained(returns, returns) == 1.0
    assert explained([6.0, 7.0, 8.0, 9.0], returns) == pytest.approx(
        1.0
    )  # a constant offset explains as much
    assert explained([7.0] * 4, returns) == pytest.approx(0.0)  # a constant explains nothing
    # R - V = 0.5, -0.5, 0.5, -0.5: variance 0.25, so 1 - 0.25/1.25 = 0.8
    assert explained([0.5, 2.5, 2.5, 4.5], returns) == pytest.approx(0.8)
    # V = -R: R - V = 2R has 4 times the variance, so 1 - 4 = -3: worse than a constant
    assert explained([-1.0, -2.0, -3.0, -4.0], returns) == pytest.approx(-3.0)


def test_explained_variance_sums_by_hand_add_up_over_ranks() -> None:
    # R = 1, 3 | 4 (singleton); V = 0, 3 | 2: R-V = 1, 0 | 2
    here = explained_variance(
        torch.tensor([NAN, 0.0, 3.0]), torch.tensor([INF, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0])
    )
    there = explained_variance(torch.tensor([NAN, 2.0]), torch.tensor([NAN, 4.0]), torch.tensor([0.0, 1.0]))
    assert here.sums == (2.0, 4.0, 10.0, 1.0, 1.0)
    assert there.sums == (1.0, 4.0, 16.0, 2.0, 4.0)
    # Var(R) = 26/3 - (8/3)² = 14/9, Var(R-V) = 5/3 - 1 = 2/3: 1 - (2/3)/(14/9) = 4/7
    assert here.merged(there).result() == pytest.approx(4 / 7)


def test_explained_variance_is_nan_where_undefined() -> None:
    assert math.isnan(explained([1.0, 2.0], [0.1, 0.1]))  # constant returns, up to rounding
    assert math.isnan(explained([1.0], [3.0]))
    assert math.isnan(ExplainedVariance((0.0,) * 5).result())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(2, 50),
    offset=st.floats(-50, 50),
    noise=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_explained_variance_matches_numpy(num_tokens: int, offset: float, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    returns = rng.normal(offset, 1, num_tokens).astype(np.float32)
    values = (returns + rng.normal(0, noise, num_tokens)).astype(np.float32)
    residual = returns.astype(np.float64) - values
    expected = 1 - residual.var() / returns.astype(np.float64).var()
    assert explained(values.tolist(), returns.tolist()) == pytest.approx(expected, rel=1e-5, abs=1e-5)
