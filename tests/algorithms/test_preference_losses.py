"""Preference losses: numbers by hand, what each is for, padding, and the limits of fp32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.preference_losses import (
    PREFERENCE_LOSSES,
    chosen_nll,
    kto,
    kto_kl,
    kto_reference_point,
    log_odds,
)
from rayrlhf.config.supervised import NEEDS_REF

LN2, LN3 = math.log(2), math.log(3)


def run(
    name: str,
    chosen: float,
    rejected: float,
    ref: tuple[float, float] | None = None,
    tokens: tuple[int, int] = (1, 1),
    **settings: float,
) -> tuple[float, dict[str, float], tuple[float, float]]:
    """Loss and metrics of one pair, and the loss' gradients of both sums."""
    sums = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    refs = [None if ref is None else torch.tensor([x]) for x in (ref or (0.0, 0.0))]
    counts = [torch.tensor([float(n)]) for n in tokens]
    loss, metrics = PREFERENCE_LOSSES[name](*sums, *refs, *counts, **settings)
    loss.sum().backward()
    assert not any(value.requires_grad for value in metrics.values())
    assert {tuple(value.shape) for value in metrics.values()} == {(1,)}
    first, second = (x.grad.item() if x.grad is not None else 0.0 for x in sums)
    return loss.item(), {key: value.item() for key, value in metrics.items()}, (first, second)


def test_dpo_by_hand() -> None:
    # h = (-3 + 4) - (-6 + 5) = 2, β·h = ln 3 with β = ln 3 / 2: σ = 3/4
    loss, metrics, gradient = run("dpo", -3.0, -6.0, (-4.0, -5.0), beta=LN3 / 2)
    assert loss == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert gradient == pytest.approx((-LN3 / 2 / 4, LN3 / 2 / 4), rel=1e-5)  # -β·(1 - σ)
    by_hand = {
        "reward/chosen": LN3 / 2,
        "reward/rejected": -LN3 / 2,
        "reward/margin": LN3,
        "reward/accuracy": 1.0,
    }
    assert metrics == pytest.approx(by_hand, rel=1e-5)


def test_ipo_by_hand() -> None:
    # h = 2, target 1/(2·0.5) = 1: (2 - 1)² with the slope 2·(2 - 1)
    loss, metrics, gradient = run("ipo", -3.0, -6.0, (-4.0, -5.0), beta=0.5)
    assert loss == pytest.approx(1.0) and gradient == pytest.approx((2.0, -2.0))
    assert metrics["reward/margin"] == pytest.approx(1.0)
    # At the target there is nothing left to learn.
    loss, _, gradient = run("ipo", -3.0, -5.0, (-4.0, -5.0), beta=0.5)
    assert loss == gradient[0] == gradient[1] == 0.0


def test_17_ipo_compares_whole_responses() -> None:
    """Sums, whatever the lengths: h = 6 over 3 tokens and 6 is at the target of β = 1/12. TRL's form, of
    means, has h = 2 there, and its target 1/(2β) is met by β = 1/4: three times ours.
    """
    loss, _, gradient = run("ipo", -3.0, -9.0, (-6.0, -6.0), tokens=(3, 3), beta=1 / 12)
    assert loss == pytest.approx(0.0, abs=1e-10) and gradient == pytest.approx((0.0, 0.0), abs=1e-5)
    other_lengths = run("ipo", -3.0, -9.0, (-6.0, -6.0), tokens=(1, 7), beta=0.25)
    assert other_lengths[0] == run("ipo", -3.0, -9.0, (-6.0, -6.0), tokens=(3, 3), beta=0.25)[0]
    assert other_lengths[0] == pytest.approx((6.0 - 2.0) ** 2)


def test_cdpo_by_hand() -> None:
    # β·h = ln 3 as above; -0.9·ln(3/4) - 0.1·ln(1/4); slope -β·(0.9·1/4 - 0.1·3/4)
    loss, _, gradient = run("cdpo", -3.0, -6.0, (-4.0, -5.0), beta=LN3 / 2, label_smoothing=0.1)
    assert loss == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), rel=1e-5)
    assert gradient == pytest.approx((-LN3 / 2 * 0.15, LN3 / 2 * 0.15), rel=1e-5)
    # The optimum is where σ(β·h) is the share of right labels: ln 3 for a quarter of wrong ones.
    _, _, gradient = run("cdpo", -3.0, -6.0, (-4.0, -5.0), beta=LN3 / 2, label_smoothing=0.25)
    assert gradient == pytest.approx((0.0, 0.0), abs=1e-6)


def test_orpo_by_hand() -> None:
    # Means: ln(3/4) over 2 tokens, ln(1/2) over 3: odds 3 and 1, so σ(ln 3) = 3/4. NLL ln(4/3).
    chosen, rejected = 2 * math.log(3 / 4), 3 * math.log(1 / 2)
    loss, metrics, gradient = run("orpo", chosen, rejected, tokens=(2, 3), beta=0.5)
    assert loss == pytest.approx(1.5 * math.log(4 / 3), rel=1e-5)
    # d log odds / d log p = 1/(1-p): 4 and 2; times β·(1 - σ) = 1/8, over the tokens; -1/2 of the NLL
    assert gradient == pytest.approx((-1 / 2 - 4 / 8 / 2, 2 / 8 / 3), rel=1e-5)
    assert metrics["reward/chosen"] == pytest.approx(0.5 * math.log(3 / 4), rel=1e-5)
    assert metrics["reward/rejected"] == pytest.approx(0.5 * math.log(1 / 2), rel=1e-5)
    assert metrics["reward/accuracy"] == 1.0


def test_simpo_by_hand() -> None:
    # Means -1 and -2: 2·(-1 + 2) - (2 - ln 3) = ln 3: σ = 3/4, slopes ∓β/4 over the tokens
    loss, metrics, gradient = run("simpo", -2.0, -8.0, tokens=(2, 4), beta=2.0, gamma=2.0 - LN3)
    assert loss == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert gradient == pytest.approx((-0.25, 0.125), rel=1e-5)
    assert metrics["reward/margin"] == pytest.approx(2.0)


def test_a_length_alone_makes_no_preference_without_a_reference() -> None:
    # The same mean over 2 and over 20 tokens
    for name in ("orpo", "simpo"):
        loss, metrics, _ = run(name, -2.0, -20.0, tokens=(2, 20), beta=1.0)
        assert metrics["reward/margin"] == metrics["reward/accuracy"] == 0.0
        assert loss == pytest.approx(LN2 + (1.0 if name == "orpo" else 0.0))


def test_chosen_nll_by_hand() -> None:
    sums = torch.tensor([-6.0, 0.0], requires_grad=True)  # the second is padding
    loss = chosen_nll(sums, torch.tensor([3.0, 0.0]))
    assert loss.tolist() == [2.0, 0.0]
    (gradient,) = torch.autograd.grad(loss[0], sums)
    assert gradient.tolist() == pytest.approx([-1 / 3, 0.0])


@given(beta=st.floats(0.01, 2.0), chosen=st.floats(-50, 0), rejected=st.floats(-50, 0))
def test_what_is_the_same(beta: float, chosen: float, rejected: float) -> None:
    ref = (-20.0, -30.0)
    plain = run("dpo", chosen, rejected, ref, beta=beta)
    assert run("cdpo", chosen, rejected, ref, beta=beta, label_smoothing=0.0) == plain
    # SimPO of one token each and no margin is DPO against a reference that is sure of both.
    loss, _, gradient = run("simpo", chosen, rejected, beta=beta, gamma=0.0)
    expected_loss, _, expected_gradient = run("dpo", chosen, rejected, (0.0, 0.0), beta=beta)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    assert gradient == pytest.approx(expected_gradient, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@given(
    tokens=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    means=st.tuples(st.floats(-5, -0.01), st.floats(-5, -0.01)),
)
def test_a_step_down_prefers_the_chosen_response(
    name: str, tokens: tuple[int, int], means: tuple[float, float]
) -> None:
    chosen, rejected = (mean * n for mean, n in zip(means, tokens, strict=True))
    ref = (chosen + 0.5, rejected - 0.5)  # the policy prefers the rejected one, against the reference
    _, metrics, (of_chosen, of_rejected) = run(name, chosen, rejected, ref, tokens, beta=0.1)
    assert of_chosen < 0 < of_rejected
    if name in NEEDS_REF:
        assert metrics["reward/accuracy"] == 0.0
        assert metrics["reward/margin"] == pytest.approx(-0.1, abs=1e-4)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize(
    ("chosen", "rejected", "tokens"),
    [
        pytest.param(0.0, 0.0, (0, 0), id="padding"),
        pytest.param(0.0, 0.0, (1, 1), id="sure of both"),
        pytest.param(-1e4, 0.0, (10, 10), id="sure of the rejected"),
        pytest.param(0.0, -1e4, (10, 10), id="sure of the chosen"),
        pytest.param(-1e-9, -1e-9, (5, 5), id="nearly sure"),
    ],
)
def test_extremes_are_finite(name: str, chosen: float, rejected: float, tokens: tuple[int, int]) -> None:
    loss, metrics, gradient = run(name, chosen, rejected, (-10.0, -10.0), tokens, beta=0.1)
    assert all(map(math.isfinite, [loss, *gradient, *metrics.values()]))


def test_log_odds_keep_their_digits() -> None:
    probabilities = torch.tensor([1e-30, 1e-5, 0.1, 0.5, 0.9, 1 - 1e-5], dtype=torch.float64)
    expected = (probabilities / (1 - probabilities)).log()
    found = log_odds(probabilities.log().float())
    # The input itself is off by 2⁻²⁴ of its size, which 1/(1-p) = 1e5 makes 6e-8 · 1e-5 · 1e5
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_low_precision_is_cast_up(name: str) -> None:
    half = torch.full((2,), -1.0, dtype=torch.bfloat16)
    loss, metrics = PREFERENCE_LOSSES[name](half, half, half, half, -half, -half, beta=0.1)
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}


def test_the_config_knows_which_need_a_reference() -> None:
    for name in PREFERENCE_LOSSES:
        if name in NEEDS_REF:
            with pytest.raises(ValueError, match=f"loss={name} compares with a reference"):
                run(name, -1.0, -2.0, beta=0.1)
        else:
            run(name, -1.0, -2.0, beta=0.1)


def test_errors() -> None:
    for name in PREFERENCE_LOSSES.keys() - {"cdpo"}:
        with pytest.raises(ValueError, match=rf"label_smoothing=0.1 has no effect on loss={name}"):
            run(name, -1.0, -2.0, (-1.0, -1.0), beta=0.1, label_smoothing=0.1)
    for wrong in (-0.1, 0.5, 1.0):
        with pytest.raises(ValueError, match=r"must be in \[0, 0.5\)"):
            run("cdpo", -1.0, -2.0, (-1.0, -1.0), beta=0.1, label_smoothing=wrong)


def test_kto_by_hand() -> None:
    # h = 3 and -1, KL 1, β = ln 3 / 2: β·(h - KL) = ln 3 and β·(KL - h) = ln 3: 1 - σ = 1/4 of both
    sums = torch.tensor([-2.0, -6.0], requires_grad=True)
    kl = torch.tensor(1.0, requires_grad=True)
    loss, metrics = kto(
        sums,
        torch.tensor([-5.0, -5.0]),
        torch.tensor([1.0, 0.0]),
        kl,
        beta=LN3 / 2,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    assert loss.tolist() == pytest.approx([0.5, 0.125])
    loss.sum().backward()
    # ∓w·β·σ·(1 - σ) = ∓w·β·3/16; the reference point is a constant
    assert sums.grad is not None and kl.grad is None
    assert sums.grad.tolist() == pytest.approx([-2 * LN3 / 2 * 3 / 16, 0.5 * LN3 / 2 * 3 / 16])
    assert {key: value.tolist() for key, value in metrics.items()} == {
        "reward/desirable": pytest.approx([1.5 * LN3, 0.0]),
        "reward/undesirable": pytest.approx([0.0, -0.5 * LN3]),
        "reward/accuracy": [1.0, 1.0],
        "data/desirable": [1.0, 0.0],
        "data/undesirable": [0.0, 1.0],
    }


def kto_of(sums: Tensor, desirable: Tensor, kl: float) -> tuple[Tensor, dict[str, Tensor]]:
    return kto(
        sums,
        torch.zeros_like(sums),
        desirable,
        torch.tensor(kl),
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )


@given(kl=st.floats(0, 20), h=st.floats(-20, 20))
def test_kto_mirrors_its_labels_around_the_reference_point(kl: float, h: float) -> None:
    mirrored = torch.tensor([h, 2 * kl - h], dtype=torch.float32)
    loss, metrics = kto_of(mirrored, torch.tensor([1.0, 0.0]), kl)
    assert loss[0].item() == pytest.approx(loss[1].item(), abs=1e-5)
    assert 0.0 < loss[0].item() < 1.0
    if abs(h - kl) > 1e-3:
        assert metrics["reward/accuracy"].tolist() == [float(h > kl)] * 2


def test_kto_keeps_its_digits_where_every_token_counts() -> None:
    loss, _ = kto_of(torch.tensor([300.0, -300.0]), torch.tensor([1.0, 0.0]), 0.0)
    assert loss.tolist() == pytest.approx([math.exp(-30.0)] * 2, rel=1e-4)  # 1 - σ(30) would be 0 in fp32


def test_the_reference_point_adds_up_over_parts() -> None:
    policy, ref = torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([-2.0, -4.0, -5.0])
    parts = kto_kl(policy[:1], ref[:1]) + kto_kl(policy[1:], ref[1:]) + kto_kl(policy[:0], ref[:0])
    assert parts.tolist() == kto_kl(policy, ref).tolist() == [3.0, 2.0]
    assert kto_reference_point(parts).item() == pytest.approx(2 / 3)
    assert kto_reference_point(kto_kl(ref, policy)).item() == 0.0  # -2/3: clamped
    assert kto_reference_point(torch.zeros(2)).item() == 0.0
    assert not kto_kl(policy.requires_grad_(), ref).requires_grad
