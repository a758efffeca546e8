"""Losses of reward models: numbers by hand, overflow, soft labels, accuracies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.reward_losses import REWARD_LOSSES, prm

LN3 = math.log(3)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_pairs_by_hand(name: str) -> None:
    chosen = torch.tensor([2.0 + LN3, 1.0, -1.0], requires_grad=True)
    rejected = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    loss, metrics = REWARD_LOSSES[name](chosen, rejected, torch.tensor([1.0, 0.0, 0.0]))
    # x = ln 3, 0, -2: ln(1 + 1/3), ln 2, ln(1 + e²)
    assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(2), math.log1p(math.exp(2))], rel=1e-5)
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    slopes = [-1 / 4, -1 / 2, -1 / (1 + math.exp(-2))]  # -(1 - σ(x))
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-5)
    assert rejected.grad.tolist() == pytest.approx([-x for x in slopes], rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())
    # The margin is asked for, not earned: it is not in the metrics.
    assert metrics["reward/margin"].tolist() == pytest.approx([1 + LN3, 0.0, -2.0], rel=1e-6)
    assert metrics["reward/accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["reward/chosen"].tolist() == pytest.approx([2 + LN3, 1.0, -1.0])
    assert metrics["reward/rejected"].tolist() == [1.0, 1.0, 1.0]


@given(
    chosen=st.floats(-1e4, 1e4, width=32),
    rejected=st.floats(-1e4, 1e4, width=32),
    margin=st.floats(0, 5, width=32),
)
def test_both_losses_are_one_function_that_never_overflows(
    chosen: float, rejected: float, margin: float
) -> None:
    columns = [torch.tensor([x], dtype=torch.float32) for x in (chosen, rejected, margin)]
    found = [loss(*columns)[0].item() for loss in REWARD_LOSSES.values()]
    assert all(map(math.isfinite, found))
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-5)


def test_prm_by_hand() -> None:
    # p(good) = 3/4 at every step
    logits = torch.tensor([[0.0, LN3], [1.0, 1.0 + LN3], [0.0, LN3]], requires_grad=True)
    loss, metrics = prm(logits, torch.tensor([1.0, 0.0, 0.5]))
    assert loss.tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4), (math.log(4 / 3) + math.log(4)) / 2], rel=1e-5
    )
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, 1].tolist() == pytest.approx([-1 / 4, 3 / 4, 1 / 4], rel=1e-5)  # p(good) - target
    assert logits.grad[:, 0].tolist() == pytest.approx([1 / 4, -3 / 4, -1 / 4], rel=1e-5)
    # The soft label counts for no accuracy.
    assert {key: value.tolist() for key, value in metrics.items()} == {
        "good": [1.0, 0.0, 0.0],
        "bad": [0.0, 1.0, 0.0],
        "good_right": [1.0, 0.0, 0.0],
        "bad_right": [0.0, 0.0, 0.0],
    }


@given(target=st.floats(0, 1))
def test_a_soft_label_is_fitted_as_a_probability(target: float) -> None:
    """At p(good) = target the gradient is 0, and the loss is the label's entropy."""
    target = min(max(target, 1e-3), 1 - 1e-3)
    logits = torch.tensor([[math.log(1 - target), math.log(target)]], requires_grad=True)
    loss, _ = prm(logits, torch.tensor([target]))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-6
    entropy = -target * math.log(target) - (1 - target) * math.log(1 - target)
    assert loss.item() == pytest.approx(entropy, rel=1e-4)


def test_prm_of_no_steps_still_has_a_gradient() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    loss, metrics = prm(logits[:0], torch.zeros(0))
    assert loss.shape == (0,) and not any(value.numel() for value in metrics.values())
    loss.sum().backward()
    assert logits.grad is not None and not logits.grad.any()


def test_prm_in_low_precision_is_cast_up() -> None:
    loss, metrics = prm(torch.zeros(2, 2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}


def test_which_steps_are_judged_right() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, 9.0]])
    _, metrics = prm(logits, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.9]))
    # Good steps: right, wrong. Bad ones: wrong, right, right (a tie is not called good).
    assert metrics["good_right"].tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["bad_right"].tolist() == [0, 0, 0, 1, 1, 0]
