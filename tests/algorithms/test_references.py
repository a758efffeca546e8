"""Every table's entries against a second implementation; gradients against finite differences of that one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.advantages import (
    group_advantages,
    masked_moments,
    spread,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.aggregate import aggregate
from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL, KLController, token_kl
from rayrlhf.algorithms.registry import (
    AGGREGATIONS,
    ESTIMATORS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    ROLLOUT_CORRECTIONS,
    WEIGHT_LEVELS,
)
from rayrlhf.algorithms.rollout_correction import rollout_weights
from rayrlhf.algorithms.value_loss import value_loss
from rayrlhf.batch import cu_seqlens_of
from tests.algorithms import references
from tests.algorithms.measured import policy_loss, totals
from tests.algorithms.references import Array, Batch

CONSTANT_LENGTH = 7.0
seeds = st.integers(0, 2**32 - 1)
# Policy tokens per sequence: some have none (an empty mask), some a single one.
token_counts = st.lists(st.integers(0, 6), min_size=1, max_size=6)
properties = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("table", "referenced"),
    [
        (ESTIMATORS, {*references.TOKEN_ADVANTAGES, *references.GROUP_ADVANTAGES}),
        ([name for name, entry in ESTIMATORS.items() if entry.needs_group], references.GROUP_ADVANTAGES),
        (POLICY_LOSSES, references.POLICY_LOSSES),
        (AGGREGATIONS, references.AGGREGATIONS),
        (KL_ESTIMATORS, references.KL_ESTIMATORS),
        (ROLLOUT_CORRECTIONS, references.ROLLOUT_CORRECTIONS),
        (WEIGHT_LEVELS, references.WEIGHT_LEVELS),
        ([controller.__name__ for controller in get_args(KLController)], references.KL_CONTROLLERS),
    ],
)
def test_every_entry_has_a_reference(table: Collection[str], referenced: Collection[str]) -> None:
    assert set(table) == set(referenced)


@dataclass(frozen=True)
class Stream:
    """Where a batch's policy tokens lie in a packed stream, with prompts, tool tokens and padding between."""

    mask: Tensor  # [T]
    cu_seqlens: Tensor  # [S+1]
    counts: list[int]  # policy tokens of each sequence
    garbage: float

    @staticmethod
    def around(counts: list[int], rng: np.random.Generator) -> Stream:
        masks = []
        for count in counts:
            others = int(rng.integers(0, 4))
            tail = rng.permutation([1.0] * count + [0.0] * others).tolist()
            masks.append([0.0, *tail])  # a sequence's first token is never the policy's
        mask = torch.tensor([x for part in masks for x in part])
        garbage = float(rng.choice([math.nan, math.inf, -math.inf]))
        return Stream(mask, cu_seqlens_of([len(part) for part in masks]), counts, garbage)

    def lay_out(self, batch: Batch) -> Tensor:
        tensor = torch.full_like(self.mask, self.garbage)
        tensor[self.mask > 0] = torch.tensor(np.concatenate(batch), dtype=torch.float32)
        return tensor

    def agrees(self, tensor: Tensor, batch: Batch) -> None:
        assert not bool(tensor[self.mask == 0].any()), "not 0 outside the mask"
        np.testing.assert_allclose(
            tensor.detach()[self.mask > 0], np.concatenate(batch), rtol=1e-5, atol=1e-5
        )

    def objective(self, name: str, per_token: Tensor) -> Tensor:
        return aggregate(
            name,
            per_token,
            self.mask,
            self.cu_seqlens,
            global_tokens=sum(self.counts),
            global_sequences=sum(count > 0 for count in self.counts),
            constant_length=CONSTANT_LENGTH,
        )


def sample(
    counts: Sequence[int], rng: np.random.Generator, mean: float = 0.0, std: float = 1.0
) -> list[Array]:
    """Normal numbers that fp32 holds exactly, so that both implementations start from the same."""
    return [rng.normal(mean, std, count).astype(np.float32).astype(np.float64) for count in counts]


def near(batch: Batch, rng: np.random.Generator, std: float) -> list[Array]:
    return [(x + rng.normal(0, std, x.size)).astype(np.float32).astype(np.float64) for x in batch]


def differences(function: Callable[[Batch], float], at: Batch, h: float = 1e-6) -> list[Array]:
    """The gradient of `function` by central differences, one number at a time."""
    result = [np.zeros_like(x) for x in at]
    for i, sequence in enumerate(at):
        for t in range(sequence.size):
            up, down = ([x.copy() for x in at] for _ in range(2))
            up[i][t] += h
            down[i][t] -= h
            result[i][t] = (function(up) - function(down)) / (2 * h)
    return result


@pytest.mark.parametrize("name", references.TOKEN_ADVANTAGES)
@properties
@given(
    counts=token_counts,
    kl_coef=st.sampled_from([0.0, 0.1]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=seeds,
)
def test_token_advantages(
    name: str, counts: list[int], kl_coef: float, gamma: float, lam: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stream = Stream.around(counts, rng)
    (scores,) = sample([len(counts)], rng)
    kl, values = sample(counts, rng), sample(counts, rng)
    rewards = references.rewards(scores, kl, kl_coef)
    expected = references.TOKEN_ADVANTAGES[name](rewards, values, gamma, lam)

    mask, cu_seqlens = stream.mask, stream.cu_seqlens
    t_scores = torch.tensor(scores, dtype=torch.float32)
    got = token_rewards(t_scores, stream.lay_out(kl), kl_coef, mask, cu_seqlens)
    stream.agrees(got, rewards)
    estimator = ESTIMATORS[name]
    t_values = stream.lay_out(values) if estimator.needs_critic else None
    advantages, returns = estimator.function(got, t_values, mask, cu_seqlens, gamma=gamma, lam=lam)
    if estimator.needs_critic:
        stream.agrees(returns, [a + v for a, v in zip(expected, values, strict=True)])
    else:
        assert returns is None
    stream.agrees(advantages, expected)


@pytest.mark.parametrize("name", references.GROUP_ADVANTAGES)
@properties
@given(data=st.data(), seed=seeds)
def test_group_advantages(name: str, data: st.DataObject, seed: int) -> None:
    smallest = 1 if ESTIMATORS[name].defined_for_one else 2
    sizes = data.draw(st.lists(st.integers(smallest, 5), min_size=2, max_size=4))
    rng = np.random.default_rng(seed)
    groups = sample(sizes, rng)
    expected = np.concatenate([references.GROUP_ADVANTAGES[name](scores) for scores in groups])
    order = rng.permutation(sum(sizes))  # as balancing over ranks leaves them
    ids = np.repeat(np.arange(len(sizes)), sizes)[order]
    scores = torch.tensor(np.concatenate(groups)[order], dtype=torch.float32)
    got = group_advantages(name, scores, torch.tensor(ids))
    np.testing.assert_allclose(got, expected[order], rtol=1e-5, atol=1e-5)

    counts = rng.integers(0, 4, sum(sizes)).tolist()
    stream = Stream.around(counts, rng)
    on_tokens = [np.full(n, x) for n, x in zip(counts, expected[order], strict=True)]
    stream.agrees(spread(got, stream.mask, stream.cu_seqlens), on_tokens)


@properties
@given(counts=token_counts, mean=st.floats(-10, 10), std=st.floats(0.1, 10), seed=seeds)
def test_whitening(counts: list[int], mean: float, std: float, seed: int) -> None:
    assert {name for name, estimator in ESTIMATORS.items() if estimator.whitened} == references.WHITENED
    rng = np.random.default_rng(seed)
    stream = Stream.around(counts, rng)
    batch = sample(counts, rng, mean, std)
    x = stream.lay_out(batch)
    stream.agrees(whiten(x, stream.mask, masked_moments(x, stream.mask)), references.whitened(batch))


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@properties
@given(
    counts=token_counts.filter(any),
    clips=st.sampled_from([(0.2, 0.2, None), (0.2, 0.28, None), (0.0, 0.0, None), (0.1, 0.3, 1.5)]),
    drift=st.sampled_from([0.05, 0.5]),
    seed=seeds,
)
def test_policy_losses_and_their_gradients(
    name: str,
    aggregation: str,
    counts: list[int],
    clips: tuple[float, float, float | None],
    drift: float,
    seed: int,
) -> None:
    low, high, dual = clips
    dual = dual if name in ("ppo", "gspo") else None
    rng = np.random.default_rng(seed)
    stream = Stream.around(counts, rng)
    old, advantages = sample(counts, rng, mean=-2.0), sample(counts, rng)
    new = near(old, rng, drift)

    def losses(logprobs: Batch) -> list[Array]:
        loss = references.POLICY_LOSSES[name]
        columns = zip(logprobs, new, old, advantages, strict=True)
        return [loss(*row, low, high, dual) if row[0].size else row[0] for row in columns]

    def objective(logprobs: Batch) -> float:
        return references.AGGREGATIONS[aggregation](losses(logprobs), CONSTANT_LENGTH)

    leaf = stream.lay_out(new).requires_grad_()
    columns = leaf, stream.lay_out(old), stream.lay_out(advantages), stream.mask, stream.cu_seqlens
    per_token, _ = policy_loss(name, *columns, clip_low=low, clip_high=high, dual_clip=dual)
    stream.agrees(per_token, losses(new))
    total = stream.objective(aggregation, per_token)
    assert total.item() == pytest.approx(objective(new), rel=1e-5, abs=1e-5)
    total.backward()
    assert leaf.grad is not None
    stream.agrees(leaf.grad, differences(objective, new))


@pytest.mark.parametrize("clip", [None, 0.1, 1.0])
@properties
@given(counts=token_counts.filter(any), drift=st.sampled_from([0.05, 0.5]), seed=seeds)
def test_value_loss_and_its_gradient(clip: float | None, counts: list[int], drift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = Stream.around(counts, rng)
    old, returns = sample(counts, rng), sample(counts, rng)
    values = near(old, rng, drift)

    def losses(v: Batch) -> list[Array]:
        return [references.value_loss(*row, clip) for row in zip(v, old, returns, strict=True)]

    leaf = stream.lay_out(values).requires_grad_()
    per_token, _ = value_loss(leaf, stream.lay_out(old), stream.lay_out(returns), stream.mask, clip=clip)
    stream.agrees(per_token, losses(values))
    per_token.sum().backward()
    assert leaf.grad is not None
    stream.agrees(leaf.grad, differences(lambda v: float(np.sum(np.concatenate(losses(v)))), values))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@properties
@given(counts=token_counts.filter(any), drift=st.sampled_from([0.01, 1.0]), seed=seeds)
def test_kl_estimators_and_their_gradients(name: str, counts: list[int], drift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = Stream.around(counts, rng)
    ref = sample(counts, rng, mean=-2.0)
    new = near(ref, rng, drift)

    def kl(logprobs: Batch) -> list[Array]:
        return [references.KL_ESTIMATORS[name](*row) for row in zip(logprobs, ref, strict=True)]

    leaf = stream.lay_out(new).requires_grad_()
    per_token = token_kl(name, leaf, stream.lay_out(ref), stream.mask)
    stream.agrees(per_token, kl(new))
    per_token.sum().backward()
    assert leaf.grad is not None
    stream.agrees(leaf.grad, differences(lambda x: float(np.sum(np.concatenate(kl(x)))), new))


@pytest.mark.parametrize("mode", ROLLOUT_CORRECTIONS)
@pytest.mark.parametrize("level", WEIGHT_LEVELS)
@properties
@given(
    counts=token_counts, drift=st.sampled_from([0.05, 0.5]), high=st.sampled_from([1.0, 1.5, 5.0]), seed=seeds
)
def test_rollout_correction(
    mode: str, level: str, counts: list[int], drift: float, high: float, seed: int
) -> None:
    low = 0.5 if mode == "mask" else 0.0
    rng = np.random.default_rng(seed)
    stream = Stream.around(counts, rng)
    rollout = sample(counts, rng, mean=-2.0)
    old = near(rollout, rng, drift)
    raw = [references.WEIGHT_LEVELS[level](*row) for row in zip(old, rollout, strict=True)]
    expected = [references.ROLLOUT_CORRECTIONS[mode](w, low, high) for w in raw]
    weights, metrics = rollout_weights(
        stream.lay_out(old),
        stream.lay_out(rollout),
        stream.mask,
        stream.cu_seqlens,
        mode=mode,
        level=level,
        low=low,
        high=high,
    )
    stream.agrees(weights, expected)
    every = np.concatenate(raw)
    sums = totals(metrics, sum(counts))
    assert sums["loss/is_weight_mean"] == pytest.approx(every.sum(), rel=1e-5)
    changed = every != np.concatenate(expected)
    assert sums["loss/is_masked_fraction"] == changed.sum()


@pytest.mark.parametrize("controller", get_args(KLController))
@properties
@given(num_steps=st.integers(0, 50), target=st.floats(0.01, 10), seed=seeds)
def test_kl_controllers(
    controller: type[FixedKL] | type[AdaptiveKL], num_steps: int, target: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kl = target * rng.lognormal(0, 0.3, num_steps)  # within ±0.2 of the target and outside
    num_samples = rng.integers(1, 200, num_steps).astype(np.float64)
    expected = references.KL_CONTROLLERS[controller.__name__](0.2, target, 1000, kl, num_samples)
    running = AdaptiveKL(0.2, target, 1000) if controller is AdaptiveKL else FixedKL(0.2)
    for value, samples in zip(kl, num_samples, strict=True):
        running.update(float(value), int(samples))
    assert running.coef == pytest.approx(expected, rel=1e-9)
