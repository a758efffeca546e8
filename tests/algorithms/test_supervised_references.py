"""Losses of supervised training against a second implementation; gradients against its finite differences."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.distill_losses import DISTILL_LOSSES, divergence, top_k_divergence
from rayrlhf.algorithms.preference_losses import (
    PREFERENCE_LOSSES,
    chosen_nll,
    kto,
    kto_kl,
    kto_reference_point,
)
from rayrlhf.algorithms.reward_losses import REWARD_LOSSES, prm
from rayrlhf.config.supervised import NEEDS_REF
from tests.algorithms import supervised_references as references
from tests.algorithms.supervised_references import Array, Pair, PairSettings

seeds = st.integers(0, 2**32 - 1)
properties = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("table", "referenced"),
    [
        (PREFERENCE_LOSSES, references.PREFERENCE_LOSSES),
        (REWARD_LOSSES, references.REWARD_LOSSES),
        (DISTILL_LOSSES, references.DISTILL_LOSSES),
    ],
)
def test_every_entry_has_a_reference(table: Collection[str], referenced: Collection[str]) -> None:
    assert set(table) == set(referenced)


def exact(x: Array) -> Array:
    """What fp32 holds exactly, so that both implementations start from the same."""
    return x.astype(np.float32).astype(np.float64)


def fp32(x: Array) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def differences(function: Callable[[Array], float], at: Array, h: float = 1e-6) -> Array:
    """The gradient of `function` by central differences, one number at a time."""
    result = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += h
        down[index] -= h
        result[index] = (function(up) - function(down)) / (2 * h)
    return result


def agree(got: Tensor, expected: Array | list[float]) -> None:
    np.testing.assert_allclose(got.detach().numpy(), np.asarray(expected), rtol=1e-5, atol=1e-5)


def gradient_agrees(loss: Tensor, leaf: Tensor, function: Callable[[Array], float], at: Array) -> None:
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    agree(gradient, differences(function, at))


def sample_pairs(count: int, rng: np.random.Generator) -> Array:
    """[P, 6], the columns of `Pair`."""
    tokens = rng.integers(1, 40, (count, 2)).astype(np.float64)
    sums = -tokens * rng.uniform(0.05, 2.0, (count, 2))
    refs = sums + rng.normal(0, 3.0, (count, 2))
    return exact(np.concatenate([sums, refs, tokens], 1))


def settings_of(name: str, beta: float, label_smoothing: float, gamma: float) -> PairSettings:
    return PairSettings(beta, label_smoothing if name == "cdpo" else 0.0, gamma)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@properties
@given(
    count=st.integers(1, 6),
    beta=st.sampled_from([0.05, 0.1, 0.5, 2.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    gamma=st.sampled_from([0.0, 0.5, 1.6]),
    seed=seeds,
)
def test_preference_losses_and_their_gradients(
    name: str, count: int, beta: float, label_smoothing: float, gamma: float, seed: int
) -> None:
    pairs = sample_pairs(count, np.random.default_rng(seed))
    chosen_with = settings_of(name, beta, label_smoothing, gamma)

    def losses(sums: Array) -> list[float]:
        rows = np.concatenate([sums, pairs[:, 2:]], 1)
        return [references.PREFERENCE_LOSSES[name](Pair(*row), chosen_with) for row in rows]

    leaf = fp32(pairs[:, :2]).requires_grad_()
    ref_chosen, ref_rejected, *tokens = fp32(pairs[:, 2:]).unbind(1)
    refs = (ref_chosen, ref_rejected) if name in NEEDS_REF else (None, None)
    loss, metrics = PREFERENCE_LOSSES[name](*leaf.unbind(1), *refs, *tokens, **chosen_with._asdict())
    agree(loss, losses(pairs[:, :2]))
    gradient_agrees(loss, leaf, lambda sums: sum(losses(sums)), pairs[:, :2])

    rewards = np.array([references.implicit_rewards(name, Pair(*row), chosen_with) for row in pairs])
    agree(metrics["reward/chosen"], rewards[:, 0])
    agree(metrics["reward/rejected"], rewards[:, 1])
    agree(metrics["reward/margin"], rewards[:, 0] - rewards[:, 1])
    clear = np.abs(rewards[:, 0] - rewards[:, 1]) > 1e-5
    right = metrics["reward/accuracy"].numpy() == (rewards[:, 0] > rewards[:, 1])
    assert right[clear].all()


@properties
@given(count=st.integers(1, 6), seed=seeds)
def test_chosen_nll_and_its_gradient(count: int, seed: int) -> None:
    pairs = sample_pairs(count, np.random.default_rng(seed))

    def losses(sums: Array) -> list[float]:
        rows = np.concatenate([sums[:, None], pairs[:, 1:]], 1)
        return [references.chosen_nll(Pair(*row)) for row in rows]

    leaf = fp32(pairs[:, 0]).requires_grad_()
    loss = chosen_nll(leaf, fp32(pairs[:, 4]))
    agree(loss, losses(pairs[:, 0]))
    gradient_agrees(loss, leaf, lambda sums: sum(losses(sums)), pairs[:, 0])


@properties
@given(
    count=st.integers(1, 6),
    beta=st.sampled_from([0.05, 0.1, 0.5]),
    weights=st.sampled_from([(1.0, 1.0), (1.33, 1.0), (0.5, 2.0)]),
    shift=st.sampled_from([-2.0, 2.0]),  # the reference point is clamped, or it is not
    seed=seeds,
)
def test_kto_and_its_gradient(
    count: int, beta: float, weights: tuple[float, float], shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sums, ref, mismatched = (exact(rng.normal(-20, 5, count)) for _ in range(3))
    ref_mismatched = exact(mismatched - rng.normal(shift, 1.0, count))
    desirable = rng.integers(0, 2, count)
    kl = references.kto_reference_point(mismatched.tolist(), ref_mismatched.tolist())

    def losses(x: Array) -> list[float]:
        rows = zip(x, ref, desirable, strict=True)
        return [references.kto(*row, kl, beta, *weights) for row in rows]

    reference_point = kto_reference_point(kto_kl(fp32(mismatched), fp32(ref_mismatched)))
    agree(reference_point[None], [kl])
    leaf = fp32(sums).requires_grad_()
    loss, metrics = kto(
        leaf,
        fp32(ref),
        torch.tensor(desirable),
        reference_point,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    agree(loss, losses(sums))
    gradient_agrees(loss, leaf, lambda x: sum(losses(x)), sums)
    agree(metrics["reward/desirable"] + metrics["reward/undesirable"], beta * (sums - ref))
    assert metrics["data/desirable"].tolist() == desirable.tolist()


@pytest.mark.parametrize("name", REWARD_LOSSES)
@properties
@given(count=st.integers(1, 6), std=st.sampled_from([0.1, 1.0, 10.0]), seed=seeds)
def test_reward_losses_and_their_gradients(name: str, count: int, std: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = exact(rng.normal(0, std, (count, 2)))
    margin = exact(rng.uniform(0, 2, count) * rng.integers(0, 2, count))

    def losses(x: Array) -> list[float]:
        loss = references.REWARD_LOSSES[name]
        return [loss(chosen, rejected, m) for (chosen, rejected), m in zip(x, margin, strict=True)]

    leaf = fp32(scores).requires_grad_()
    loss, metrics = REWARD_LOSSES[name](leaf[:, 0], leaf[:, 1], fp32(margin))
    agree(loss, losses(scores))
    gradient_agrees(loss, leaf, lambda x: sum(losses(x)), scores)
    agree(metrics["reward/margin"], scores[:, 0] - scores[:, 1])
    assert metrics["reward/accuracy"].tolist() == (scores[:, 0] > scores[:, 1]).tolist()


@properties
@given(count=st.integers(1, 8), seed=seeds)
def test_prm_and_its_gradient(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = exact(rng.normal(0, 2, (count, 2)))
    targets = exact(rng.choice([0.0, 1.0, 0.3], count))

    def losses(x: Array) -> list[float]:
        return [references.prm(bad, good, target) for (bad, good), target in zip(x, targets, strict=True)]

    leaf = fp32(logits).requires_grad_()
    loss, metrics = prm(leaf, fp32(targets))
    agree(loss, losses(logits))
    gradient_agrees(loss, leaf, lambda x: sum(losses(x)), logits)
    says_good = logits[:, 1] > logits[:, 0]
    assert metrics["good_right"].tolist() == (says_good & (targets == 1)).tolist()
    assert metrics["bad_right"].tolist() == (~says_good & (targets == 0)).tolist()
    assert metrics["good"].tolist() == (targets == 1).tolist()
    assert metrics["bad"].tolist() == (targets == 0).tolist()


@pytest.mark.parametrize("name", DISTILL_LOSSES)
@properties
@given(
    count=st.integers(1, 3),
    k=st.sampled_from([None, 1, 2, 4, 5]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    seed=seeds,
)
def test_distill_losses_and_their_gradients(
    name: str, count: int, k: int | None, beta: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, of_teacher = (exact(rng.normal(0, 1.5, (count, 5))) for _ in range(2))
    teacher = [references.probabilities(row) for row in of_teacher]
    order = [range(5) if k is None else np.argsort(-p)[:k].tolist() for p in teacher]

    def losses(x: Array) -> list[float]:
        return [
            references.DISTILL_LOSSES[name](
                references.merged(references.probabilities(row), kept), references.merged(p, kept), beta
            )
            for row, p, kept in zip(x, teacher, order, strict=True)
        ]

    leaf = fp32(logits).requires_grad_()
    teacher_logprobs = fp32(of_teacher).log_softmax(-1)
    if k is None:
        loss = divergence(name, leaf, teacher_logprobs, beta=beta)
    else:
        ids = torch.tensor(order)
        loss = top_k_divergence(name, leaf, ids, teacher_logprobs.gather(-1, ids), beta=beta)
    agree(loss, losses(logits))
    gradient_agrees(loss, leaf, lambda x: sum(losses(x)), logits)
