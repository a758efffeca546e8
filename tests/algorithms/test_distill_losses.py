"""Divergences: numbers by hand, limits, bounds, and what merging outcomes does to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.distill_losses import (
    DISTILL_LOSSES,
    divergence,
    jsd,
    top_k_divergence,
    top_k_outcomes,
)

LN2, LN3 = math.log(2), math.log(3)
seeds = st.integers(0, 2**32 - 1)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def logits_pair(seed: int, n: int, vocabulary: int, std: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student logits and teacher log-probs [n, V]."""
    rng = np.random.default_rng(seed)
    student, teacher = (torch.tensor(rng.normal(0, std, (n, vocabulary)), dtype=torch.float32) for _ in "ab")
    return student, teacher.log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "expected", "slope"),
    [
        # teacher (1/2, 1/2), student (1/4, 3/4): ½·ln 2 + ½·ln(2/3); d/dz = student - teacher
        ("forward_kl", 0.5 * LN2 + 0.5 * math.log(2 / 3), 0.25),
        # ¼·ln(1/2) + ¾·ln(3/2); d/dz_1 = p_1·(ln(p_1/q_1) - KL)
        ("reverse_kl", -0.25 * LN2 + 0.75 * math.log(1.5), 0.75 * (math.log(1.5) - 0.1308120)),
    ],
)
def test_kl_by_hand(name: str, expected: float, slope: float) -> None:
    logits = torch.tensor([[0.0, LN3]], requires_grad=True)
    loss = divergence(name, logits, logs(0.5, 0.5))
    assert loss.tolist() == pytest.approx([expected], rel=1e-5)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.squeeze().tolist() == pytest.approx([-slope, slope], rel=1e-4)


def test_jsd_by_hand() -> None:
    # teacher (1, 0), student (1/2, 1/2), β = 1/2: m = (3/4, 1/4)
    # ½·ln(4/3) + ½·(½·ln(2/3) + ½·ln 2)
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * LN2
    assert divergence("jsd", torch.zeros(1, 2), logs(1.0, 0.0)).item() == pytest.approx(expected, rel=1e-5)
    # β = 1/4: m = ¼·teacher + ¾·student = (5/8, 3/8)
    expected = 0.25 * math.log(8 / 5) + 0.75 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3))
    found = divergence("jsd", torch.zeros(1, 2), logs(1.0, 0.0), beta=0.25)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DISTILL_LOSSES)
@given(seed=seeds, beta=st.floats(0.05, 0.95))
def test_never_negative_and_zero_only_where_both_agree(name: str, seed: int, beta: float) -> None:
    student, teacher = logits_pair(seed, 4, 7)
    assert bool((divergence(name, student, teacher, beta=beta) > 1e-4).all())
    agreeing = (teacher + 3.0).requires_grad_()  # logits of the same distribution
    loss = divergence(name, agreeing, teacher, beta=beta)
    assert loss.abs().max().item() < 1e-6
    loss.sum().backward()
    assert agreeing.grad is not None and agreeing.grad.abs().max().item() < 1e-6


@given(seed=seeds)
def test_jsd_is_between_the_two_kls(seed: int) -> None:
    """D/β → forward KL for β → 0 and D/(1-β) → reverse KL for β → 1, both to first order."""
    student, teacher = logits_pair(seed, 3, 5, std=1.0)
    student, teacher = student.double(), teacher.double()
    beta = 1e-6
    forward, reverse = (divergence(name, student, teacher) for name in ("forward_kl", "reverse_kl"))
    near_forward = divergence("jsd", student, teacher, beta=beta) / beta
    near_reverse = divergence("jsd", student, teacher, beta=1 - beta) / beta
    torch.testing.assert_close(near_forward, forward, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_reverse, reverse, rtol=1e-3, atol=1e-4)
    # Symmetric at one half, and never above ln 2.
    half = jsd(student.log_softmax(-1), teacher)
    torch.testing.assert_close(half, jsd(teacher, student.log_softmax(-1)), rtol=1e-9, atol=1e-12)
    assert half.max().item() < LN2


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = teacher.topk(k, -1)
    return ids, values


def test_top_k_by_hand() -> None:
    # Teacher (1/2, 1/4, 1/8, 1/8), student (1/4, 1/4, 1/4, 1/4). The top 2 and the rest:
    # teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2).
    teacher, student = logs(0.5, 0.25, 0.125, 0.125), torch.zeros(1, 4)
    outcomes = top_k_outcomes(student, *top(teacher, 2))
    assert outcomes[0].exp().squeeze().tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert outcomes[1].exp().squeeze().tolist() == pytest.approx([0.5, 0.25, 0.25])
    found = {name: top_k_divergence(name, student, *top(teacher, 2)).item() for name in DISTILL_LOSSES}
    # ½·ln 2 - ¼·ln 2 = ¼·ln 2; ¼·ln(1/2) + ½·ln 2 = ¼·ln 2; m = (3/8, 1/4, 3/8)
    expected_jsd = 0.5 * (0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)) * 2
    expected = {"forward_kl": 0.25 * LN2, "reverse_kl": 0.25 * LN2, "jsd": expected_jsd}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DISTILL_LOSSES)
@given(seed=seeds, beta=st.sampled_from([0.1, 0.5, 0.9]))
def test_top_k_is_a_lower_bound_that_grows_with_k(name: str, seed: int, beta: float) -> None:
    student, teacher = (x.double() for x in logits_pair(seed, 4, 9))
    teacher = teacher.log_softmax(-1)  # in fp32 a small rest is mostly rounding
    full = divergence(name, student, teacher, beta=beta)
    bounds = [top_k_divergence(name, student, *top(teacher, k), beta=beta) for k in range(1, 10)]
    for lower, upper in zip(bounds, [*bounds[1:], full], strict=True):
        assert bool((lower <= upper + 1e-6).all())
    torch.testing.assert_close(bounds[-1], full, rtol=1e-5, atol=1e-6)  # k = V


@pytest.mark.parametrize("name", DISTILL_LOSSES)
@given(seed=seeds)
def test_the_bound_is_attained_where_only_the_rest_as_a_whole_differs(name: str, seed: int) -> None:
    _, teacher = logits_pair(seed, 4, 9)
    ids, logprobs = top(teacher, 3)
    # Other odds of the three tokens, the same odds among the other six
    student = teacher.scatter_add(-1, ids, torch.tensor([[0.7, -0.4, 1.1]]).expand(4, 3)) + 2.0
    full = divergence(name, student, teacher)
    torch.testing.assert_close(top_k_divergence(name, student, ids, logprobs), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DISTILL_LOSSES)
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_a_teacher_that_is_sure_is_finite(name: str, k: int) -> None:
    teacher = logs(1.0, 0.0, 0.0, 0.0, 0.0)
    ids, logprobs = torch.arange(k)[None], teacher[:, :k]
    logits = torch.tensor([[30.0, 0.0, -30.0, 5.0, 1.0]], requires_grad=True)
    if name == "reverse_kl":
        logprobs = logprobs.clamp_min(-50.0)  # where the teacher excludes a token, the reverse KL is infinite
    loss = top_k_divergence(name, logits, ids, logprobs)
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(logits.grad).all())


def test_tokens_that_nobody_can_say_add_nothing() -> None:
    """Logits of -inf, as of rows that only pad a vocabulary."""
    for name in DISTILL_LOSSES:
        logits = torch.tensor([[0.0, LN3, -torch.inf]], requires_grad=True)
        loss = divergence(name, logits, logs(0.5, 0.5, 0.0))
        assert loss.item() == pytest.approx(divergence(name, logits[:, :2], logs(0.5, 0.5)).item())
        loss.sum().backward()
        assert logits.grad is not None and bool(torch.isfinite(logits.grad).all()) and logits.grad[0, 2] == 0


def test_errors() -> None:
    for beta in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match=f"beta={beta} must be > 0 and < 1"):
            divergence("jsd", torch.zeros(1, 2), logs(0.5, 0.5), beta=beta)
    with pytest.raises(ValueError, match="'tv' is not one of forward_kl, reverse_kl, jsd"):
        divergence("tv", torch.zeros(1, 2), logs(0.5, 0.5))
