"""KL estimators by hand and against exact expectations; controllers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL, KLController, token_kl
from rayrlhf.algorithms.registry import KL_ESTIMATORS

LN2 = math.log(2.0)


@pytest.mark.parametrize(
    ("name", "delta", "expected"),
    [
        ("k1", LN2, LN2),
        ("k1", -LN2, -LN2),
        ("k2", LN2, 0.24022651),  # 0.69314718² / 2
        ("k2", -LN2, 0.24022651),
        ("k3", LN2, 0.19314718),  # 1/2 - 1 + 0.69314718
        ("k3", -LN2, 0.30685282),  # 2 - 1 - 0.69314718
        ("k3", 0.0, 0.0),
        ("k3", -30.0, 21995.4658),  # exp(10) - 1 - 30 = 22026.4658 - 31: clamped inside exp only
        ("k3", 30.0, 29.0000454),  # exp(-10) - 1 + 30
    ],
)
def test_hand_derived(name: str, delta: float, expected: float) -> None:
    ref = torch.tensor([-1.5, -3.0])  # two tokens: the reference alone must not matter
    result = KL_ESTIMATORS[name].function(ref + delta, ref)
    assert result.tolist() == pytest.approx([expected, expected], rel=1e-5, abs=1e-6)


def test_k3_keeps_its_digits_near_zero() -> None:
    # Δ = 1e-4: Δ²/2 - Δ³/6 = 5e-9 - 1.7e-13. exp(-Δ) - 1 in fp32 may be off by 6e-8, ten times the value.
    result = KL_ESTIMATORS["k3"].function(torch.tensor([1e-4]), torch.zeros(1))
    assert result.item() == pytest.approx(4.99983e-9, rel=1e-2)


def test_low_precision_is_cast_up() -> None:
    for estimator in KL_ESTIMATORS.values():
        assert estimator.function(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.float32


def test_expectations_over_a_small_vocabulary() -> None:
    # Exact sums over three tokens: E[k1] = E[k3] = KL, and k2's gradient at fixed samples averages to KL's.
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    probs = logprobs.exp()
    kl = (probs * (logprobs - ref)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    for name in ("k1", "k3"):
        expectation = (probs * KL_ESTIMATORS[name].function(logprobs, ref)).sum()
        assert expectation.item() == pytest.approx(kl.item(), rel=1e-5)
    (k2_gradient,) = torch.autograd.grad(
        (probs.detach() * KL_ESTIMATORS["k2"].function(logprobs, ref)).sum(), logits
    )
    torch.testing.assert_close(k2_gradient, kl_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_garbage_outside_the_mask_reaches_neither_value_nor_gradient(name: str) -> None:
    logprobs = torch.tensor([math.nan, -1.0, -math.inf, -2.0, math.inf], requires_grad=True)
    ref = torch.tensor([-1.0, -1.0 - LN2, -math.inf, -2.0, math.nan])
    result = token_kl(name, logprobs, ref, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    result.sum().backward()
    by_hand = {"k1": LN2, "k2": 0.24022651, "k3": 0.19314718}[name]
    assert result.tolist() == pytest.approx([0.0, by_hand, 0.0, 0.0, 0.0], abs=1e-6)
    # d k1/dΔ = 1, d k2/dΔ = Δ, d k3/dΔ = 1 - exp(-Δ) = 1/2, at Δ = ln 2 and at Δ = 0
    first, second = {"k1": (1.0, 1.0), "k2": (LN2, 0.0), "k3": (0.5, 0.0)}[name]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, first, 0.0, second, 0.0], abs=1e-6)


def test_empty_mask_is_all_zero() -> None:
    garbage = torch.full((3,), math.nan)
    assert token_kl("k3", garbage, garbage, torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="kl_estimator='k4' is not one of k1, k2, k3"):
        token_kl("k4", torch.zeros(1), torch.zeros(1), torch.ones(1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pairs=st.lists(
        st.tuples(st.floats(-25, 0, width=32), st.floats(-25, 0, width=32)), min_size=1, max_size=20
    )
)
def test_estimators_match_float64_loops(pairs: list[tuple[float, float]]) -> None:
    logprobs, ref = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    for index, (logprob, ref_logprob) in enumerate(pairs):
        delta = logprob - ref_logprob
        k3 = math.exp(min(max(-delta, -10.0), 10.0)) - 1.0 + delta
        expected = {"k1": delta, "k2": delta * delta / 2, "k3": k3}
        for name, value in expected.items():
            assert KL_ESTIMATORS[name].function(logprobs, ref)[index].item() == pytest.approx(
                value, rel=1e-5, abs=1e-5
            )
    assert (KL_ESTIMATORS["k3"].function(logprobs, ref) >= -1e-6).all()


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(12.0, 100)  # error 1 -> clipped to 0.2: 0.1 · (1 + 0.2·0.1) = 0.102
    assert controller.coef == pytest.approx(0.102)
    controller.update(3.0, 100)  # error -0.5 -> -0.2: 0.102 · 0.98 = 0.09996
    assert controller.coef == pytest.approx(0.09996)
    controller.update(6.6, 100)  # error 0.1: 0.09996 · 1.01 = 0.1009596
    assert controller.coef == pytest.approx(0.1009596)
    controller.update(6.0, 100)  # on target
    assert controller.coef == pytest.approx(0.1009596)


def test_adaptive_controller_survives_a_bad_step() -> None:
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    controller.update(math.nan, 100)
    assert controller.coef == 0.1
    controller.update(math.inf, 100)  # clipped like any other large KL
    assert controller.coef == pytest.approx(0.102)


def test_states() -> None:
    adaptive = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    adaptive.update(12.0, 100)
    restored = AdaptiveKL(coef=0.5, target=6.0, horizon=1000)
    restored.load_state_dict(adaptive.state_dict())
    assert restored == adaptive
    fixed: KLController = FixedKL(0.3)
    fixed.update(100.0, 64)
    fixed.load_state_dict(adaptive.state_dict())
    assert fixed.coef == 0.3  # the config's, whatever the checkpoint held
    adaptive.load_state_dict(fixed.state_dict())
    assert adaptive.coef == 0.3


def test_settings_that_cannot_steer() -> None:
    for coef, target, horizon in [(0.0, 6.0, 10), (0.1, 0.0, 10), (0.1, -1.0, 10), (0.1, 6.0, 0)]:
        with pytest.raises(ValueError, match="needs coef, target and horizon > 0"):
            AdaptiveKL(coef=coef, target=target, horizon=horizon)
    with pytest.raises(ValueError, match="the horizon must be > 20 samples"):
        AdaptiveKL(coef=0.1, target=6.0, horizon=20).update(1.0, 100)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kls=st.lists(st.floats(-5, 50), min_size=1, max_size=30),
    num_samples=st.integers(1, 4000),
    target=st.floats(0.01, 10),
)
def test_adaptive_controller_moves_towards_its_target(
    kls: list[float], num_samples: int, target: float
) -> None:
    controller = AdaptiveKL(coef=0.2, target=target, horizon=1000)
    expected = 0.2
    for kl in kls:
        before = controller.coef
        controller.update(kl, num_samples)
        expected *= 1 + float(np.clip(kl / target - 1, -0.2, 0.2)) * num_samples / 1000
        assert controller.coef == pytest.approx(expected, rel=1e-9)
        assert controller.coef > 0
        assert (controller.coef - before) * (kl - target) >= 0
