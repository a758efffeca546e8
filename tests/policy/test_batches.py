"""Samples into balanced, packed mini-batches with advantages, in one process and on simulated ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.batch import PolicyBatch, pack_samples, padding_samples
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.observe.metric_keys import METRICS
from rayrlhf.policy.batches import (
    MiniBatch,
    Packing,
    add_advantages,
    balance_and_pack,
    size_table,
    with_group_advantages,
    with_token_advantages,
)
from rayrlhf.samples import Sample
from rayrlhf.train.collectives import Ranks
from tests.samples import make_prompt, make_sample

GROUP_ESTIMATORS = ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"]

Balanced = tuple[list[MiniBatch], dict[str, float]]


# Balance and pack


def numbered(lengths: Sequence[int]) -> list[Sample]:
    """One-token prompts, and responses of which each token names its sample."""
    return [
        make_sample([100 + i] * (length - 1), prompt=make_prompt([7]), group_id=i, score=float(i))
        for i, length in enumerate(lengths)
    ]


def members(batches: MiniBatch) -> list[list[int]]:
    """The numbers of the samples in each micro-batch; none for padding."""
    return [[group for group in batch.group_ids.tolist() if group >= 0] for batch in batches]


def made(
    lengths: Sequence[int],
    parts: int,
    budget: int,
    *,
    seed: int = 0,
    step: int = 0,
    full_batch: int | None = None,
    ranks: Ranks | None = None,
) -> Balanced:
    packing = Packing(parts, full_batch or max(1, len(lengths)), budget, seed)
    return balance_and_pack(numbered(lengths), packing, ranks or Ranks(), step=step)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=5, max_size=20),
    parts=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_every_sample_once_and_never_over_the_budget(lengths: list[int], parts: int, seed: int) -> None:
    mini_batches, metrics = made(lengths, parts, 15, seed=seed, step=3)
    assert len(mini_batches) == metrics["data/mini_batches"] == parts
    found = [members(batches) for batches in mini_batches]
    assert sorted(i for batches in found for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [sum(map(len, batches)) for batches in found]
    assert max(sizes) - min(sizes) <= 1
    for batch in (batch for batches in mini_batches for batch in batches):
        assert batch.num_tokens <= 15
        for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
            number = int(batch.group_ids[i])
            if number >= 0:
                assert batch.input_ids[start:end].tolist() == [7] + [100 + number] * (lengths[number] - 1)
                assert batch.scores[i] == number
    again, _ = made(lengths, parts, 15, seed=seed, step=3)
    assert [members(batches) for batches in again] == found, "the same after a restart"
    assert set(metrics) <= set(METRICS)
    assert metrics["data/tokens"] == sum(lengths) and metrics["data/samples"] == len(lengths)


def test_the_mini_batches_change_with_seed_and_step() -> None:
    def first(seed: int, step: int) -> list[list[int]]:
        return members(made([2] * 30, 2, 100, seed=seed, step=step)[0][0])

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1) and first(0, 0) != first(1, 0)


def test_a_sample_over_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="9 tokens, more than the micro-batch budget of 8"):
        made([9], 1, 8)


def test_ranks_with_less_to_do_fill_up() -> None:
    class OneOfSeveral(Ranks):
        """Some other rank has three micro-batches in each mini-batch."""

        def max(self, value: float) -> float:
            return max(value, 3)

    mini_batches, metrics = made([8, 8, 8], 2, 10, ranks=OneOfSeveral())
    assert [[len(batch) for batch in members(batches)] for batches in mini_batches] == [
        [1, 1, 0],
        [1, 0, 0],
    ]
    assert all(not batch.loss_mask.any() for batch in (mini_batches[0][2], *mini_batches[1][1:]))
    assert metrics["data/padding_fraction"] == 0.5
    assert metrics["data/fill"] == 0.8  # 24 tokens in three micro-batches of 10


def test_without_samples_there_is_still_a_micro_batch() -> None:
    assert [members(batches) for batches in made([], 2, 10)[0]] == [[[]]]


@pytest.mark.parametrize(
    ("num_samples", "sizes"),
    [
        (64, [8] * 8),  # a full batch
        (63, [8] * 7 + [7]),
        (16, [8, 8]),  # two groups of eight have been kept
        (9, [5, 4]),  # never more than 8 in one
        (5, [5]),  # at 8 mini-batches, 3 had been empty
        (1, [1]),
    ],
)
def test_11_fewer_samples_make_up_fewer_mini_batches(num_samples: int, sizes: list[int]) -> None:
    mini_batches, metrics = made([3] * num_samples, 8, 64, full_batch=64)
    assert [sum(map(len, members(batches))) for batches in mini_batches] == sizes
    assert metrics["data/mini_batches"] == len(sizes)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 40))
def test_11_no_mini_batch_is_empty_or_over_its_size(full: int, parts: int, num_samples: int) -> None:
    parts, num_samples = min(parts, full), min(num_samples, full)
    mini_batches, _ = made([2] * num_samples, parts, 64, full_batch=full)
    sizes = [sum(map(len, members(batches))) for batches in mini_batches]
    assert sum(sizes) == num_samples and len(sizes) <= parts
    assert all(1 <= size <= -(-full // parts) for size in sizes) or num_samples == 0


class OneOf(Ranks):
    """One rank of several whose samples are known; what it sends is kept for the others."""

    def __init__(
        self, rank: int, by_rank: Sequence[Sequence[Sample]], sent: dict[int, list[list[Any]]]
    ) -> None:
        self.by_rank = by_rank
        self.sent = sent  # by the sender's rank, then by the receiver's
        self._rank = rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return len(self.by_rank)

    def gather(self, items: list[Any]) -> list[Any]:
        everyone = [size_table(samples) for samples in self.by_rank]
        assert np.array_equal(items, [everyone[self.rank]])
        return everyone

    def exchange(self, outgoing: list[list[Any]]) -> list[Any]:
        self.sent[self.rank] = outgoing
        return [item for sender in sorted(self.sent) for item in self.sent[sender][self.rank]]


def balanced_over(by_rank: Sequence[Sequence[Sample]], packing: Packing) -> list[Balanced]:
    """By rank. Two rounds: in the first all have sent."""
    sent: dict[int, list[list[Any]]] = {}
    found: list[Balanced] = []
    for _ in range(2):
        found = [
            balance_and_pack(samples, packing, OneOf(rank, by_rank, sent), step=0)
            for rank, samples in enumerate(by_rank)
        ]
    return found


def test_ranks_get_equal_work_and_the_mini_batches_of_a_single_rank() -> None:
    lengths = [40, 38, 4, 5, 6, 30, 28, 3, 2, 33, 31, 7]
    alone, _ = made(lengths, 2, 64)
    one_rank = [sorted(i for batch in members(batches) for i in batch) for batches in alone]
    samples = numbered(lengths)
    # The first has collected two, the other ten.
    balanced = balanced_over([samples[:2], samples[2:]], Packing(2, 12, 64, seed=0))
    found = [[members(batches) for batches in mini_batches] for mini_batches, _ in balanced]
    together = [sorted(i for rank in found for batch in rank[part] for i in batch) for part in range(2)]
    assert together == one_rank
    work = [sum(lengths[i] for part in rank for batch in part for i in batch) for rank in found]
    assert max(work) <= 1.1 * min(work)
    for _, metrics in balanced:
        assert metrics["data/imbalance"] < 0.05 < metrics["data/imbalance_before"]


# Shared prefixes


def grouped(num_groups: int, group_size: int, *, prompt: int = 20, response: int = 6) -> list[Sample]:
    """Groups with a prompt of their own; responses differ in their tokens."""
    return [
        make_sample(
            [100 + index] * (response + index % 2),
            prompt=make_prompt([group + 1] * prompt),
            group_id=group,
            sample_index=index,
            score=float(10 * group + index),
        )
        for group in range(num_groups)
        for index in range(group_size)
    ]


def test_groups_stay_together_and_the_budget_counts_their_prompt_once() -> None:
    samples = grouped(8, 4)  # 20 + 26 rows each, for 106 tokens
    packing = Packing(2, len(samples), 100, seed=0, share_prefixes=True)
    mini_batches, metrics = balance_and_pack(samples, packing, Ranks(), step=0)
    for batches in mini_batches:
        assert len(batches) == 2, "two groups in each micro-batch: 92 rows of 100"
        for batch in batches:
            counts = batch.group_ids.unique(return_counts=True)[1]
            assert counts.tolist() == [4, 4] and batch.num_rows == 92 and batch.num_tokens == 212
    assert metrics["data/tokens"] == 8 * 106 and metrics["data/fill"] == pytest.approx(0.92)
    assert metrics["data/prefix_share"] == pytest.approx(60 / 106)
    apart = replace(packing, share_prefixes=False)
    others, plain = balance_and_pack(samples, apart, Ranks(), step=0)
    assert plain["data/prefix_share"] == 0.0
    for batches, unshared in zip(mini_batches, others, strict=True):
        assert sorted(torch.cat([b.scores for b in batches]).tolist()) == sorted(
            torch.cat([b.scores for b in unshared]).tolist()
        ), "the same mini-batches"
        assert all(batch.num_tokens <= 100 and batch.prefixes is None for batch in unshared)


def test_a_group_goes_on_in_the_next_mini_batch() -> None:
    mini_batches, _ = balance_and_pack(grouped(3, 4), Packing(2, 12, 400, 0, True), Ranks(), step=0)
    sizes = [
        sorted(torch.cat([b.group_ids for b in batches]).unique(return_counts=True)[1].tolist())
        for batches in mini_batches
    ]
    assert sizes == [[2, 4], [2, 4]]


def test_short_prompts_are_not_shared() -> None:
    mini_batches, metrics = balance_and_pack(
        grouped(2, 4, prompt=8), Packing(1, 8, 64, 0, True), Ranks(), step=0
    )
    assert metrics["data/prefix_share"] == 0.0
    assert all(batch.num_rows == batch.num_tokens <= 64 for batch in mini_batches[0])


def groups_of_ranks(num_groups: int, group_size: int) -> tuple[list[list[list[int]]], list[Balanced]]:
    """By rank, the groups of each micro-batch's samples."""
    samples = grouped(num_groups, group_size)
    packing = Packing(1, len(samples), 400, seed=0, share_prefixes=True)
    balanced = balanced_over([samples[:group_size], samples[group_size:]], packing)
    return [[b.group_ids.tolist() for b in mini_batches[0]] for mini_batches, _ in balanced], balanced


def test_ranks_get_whole_groups_where_these_balance() -> None:
    found, balanced = groups_of_ranks(4, 4)
    assert sorted(group for rank in found for batch in rank for group in batch) == sorted([0, 1, 2, 3] * 4)
    assert [[len(set(batch)) for batch in rank] for rank in found] == [[2], [2]]
    assert all(metrics["data/imbalance"] == 0.0 for _, metrics in balanced)


def test_groups_are_halved_where_ranks_would_wait() -> None:
    # Of three groups of 46 rows one rank would have two. The halves of one have 33: 79 rows for each rank.
    found, balanced = groups_of_ranks(3, 4)
    assert [[sorted(batch.count(g) for g in set(batch)) for batch in rank] for rank in found] == [
        [[2, 4]],
        [[2, 4]],
    ]
    assert all(metrics["data/imbalance"] < 0.05 for _, metrics in balanced)


# Advantages. One-token prompts, so that position 0 of each sequence is masked and the rest is the policy's.

Row = tuple[int, float, int]  # group, score, response tokens


def packed(*rows: Row) -> PolicyBatch:
    [batch] = packed_as("gae", rows)
    return batch


def packed_as(advantage: str, *batches: Sequence[Row]) -> list[PolicyBatch]:
    """Samples whose groups were whole before they were packed into these batches."""
    samples = [
        make_sample(range(tokens), prompt=make_prompt([7]), group_id=group, score=score)
        for rows in batches
        for group, score, tokens in rows
    ]
    left = iter(with_group_advantages(samples, advantage))
    return [pack_samples(list(islice(left, len(rows)))) for rows in batches]


def with_kl(batch: PolicyBatch, kl: list[float]) -> PolicyBatch:
    """Log-probabilities whose k1 estimate is `kl` [T]."""
    ref = torch.linspace(-1.0, -2.0, batch.num_tokens)
    return replace(batch, old_logprobs=ref + torch.tensor(kl), ref_logprobs=ref)


def advantages_of(batches: Sequence[PolicyBatch]) -> list[list[float]]:
    found = [batch.advantages for batch in batches]
    return [advantages.tolist() for advantages in found if advantages is not None]


def approximately(rows: list[list[float]]) -> list[Any]:
    return [pytest.approx(row, abs=1e-5) for row in rows]


def algorithm(advantage: str, **fields: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"advantage": advantage, **fields})


def critics_batch() -> PolicyBatch:
    batch = with_kl(packed((0, 1.0, 2), (1, -1.0, 1)), [9.0, 0.5, -1.0, 9.0, 0.0])
    return replace(batch, values=torch.tensor([0.0, 0.2, 0.4, 0.0, -0.5]))


# β = 0.1: r = (-0.05, 0.1 + 1) and (-1). With γ = 1, λ = 0.5: δ = (-0.05 + 0.4 - 0.2, 1.1 - 0.4) = (0.15,
# 0.7), so A = (0.15 + 0.5 · 0.7, 0.7) = (0.5, 0.7), and A = -1 + 0.5 in the second. Returns are A + V.
RAW = [0.0, 0.5, 0.7, 0.0, -0.5]
RETURNS = [0.0, 0.7, 1.1, 0.0, -1.0]
# Over (0.5, 0.7, -0.5): mean 0.7/3, variance 0.99/3 - (0.7/3)² = 0.2755556, deviation 0.5249339.
WHITE = [0.0, 0.5080010, 0.8890017, 0.0, -1.3970027]


@pytest.mark.parametrize("whiten, expected", [(False, RAW), (True, WHITE)])
def test_gae_by_hand(whiten: bool, expected: list[float]) -> None:
    gae = algorithm("gae", lam=0.5, whiten_advantages=whiten)
    [batch] = add_advantages([critics_batch()], gae, Ranks(), kl_coef=0.1)
    assert advantages_of([batch]) == approximately([expected])
    assert batch.returns is not None and batch.returns.tolist() == pytest.approx(RETURNS, abs=1e-6)


def test_a_kl_in_the_loss_is_not_in_the_reward() -> None:
    gae = algorithm("gae", lam=0.5, whiten_advantages=False, kl_in="loss", kl_estimator="k2")
    [batch] = add_advantages([critics_batch()], gae, Ranks(), kl_coef=0.1)
    # r = (0, 1): δ = (0.4 - 0.2, 1 - 0.4), A = (0.2 + 0.3, 0.6)
    assert advantages_of([batch]) == approximately([[0.0, 0.5, 0.6, 0.0, -0.5]])


@pytest.mark.parametrize(
    "whiten, expected",
    [
        # γ = 0.5: G = (-0.05 + 0.5 · 1.1, 1.1) and -1
        (False, [0.0, 0.5, 1.1, 0.0, -1.0]),
        # mean 0.2, variance 2.46/3 - 0.04 = 0.78, deviation 0.8831761
        (True, [0.0, 0.3396831, 1.0190493, 0.0, -1.3587324]),
    ],
)
def test_reinforce_pp_by_hand(whiten: bool, expected: list[float]) -> None:
    batch = with_kl(packed((0, 1.0, 2), (1, -1.0, 1)), [9.0, 0.5, -1.0, 9.0, 0.0])
    reinforce_pp = algorithm("reinforce_pp", gamma=0.5, whiten_advantages=whiten)
    done = add_advantages([batch], reinforce_pp, Ranks(), kl_coef=0.1)
    assert advantages_of(done) == approximately([expected])
    assert done[0].returns is None


# Two groups whose members are in different micro-batches: 1 and 3 in group 0, twice 2 in group 1.
SPLIT = ((0, 1.0, 2), (1, 2.0, 1)), ((1, 2.0, 1), (0, 3.0, 1))
ROOT_HALF = 0.7071063  # 1/(√2 + 1e-6)


@pytest.mark.parametrize(
    "advantage, expected",
    [
        ("rloo", [[0, -2, -2, 0, 0], [0, 0, 0, 2]]),  # minus the other one's score
        ("grpo", [[0, -ROOT_HALF, -ROOT_HALF, 0, 0], [0, 0, 0, ROOT_HALF]]),  # mean 2, deviation √2
        ("dr_grpo", [[0, -1, -1, 0, 0], [0, 0, 0, 1]]),
        # Then whitened over five tokens: mean -0.2, variance 3/5 - 0.04 = 0.56, deviation 0.7483315
        ("reinforce_pp_baseline", [[0, -1.0690450, -1.0690450, 0, 0.2672612], [0, 0.2672612, 0, 1.6035675]]),
    ],
)
def test_groups_by_hand(advantage: str, expected: list[list[float]]) -> None:
    batches = packed_as(advantage, *SPLIT)
    assert advantages_of(
        add_advantages(batches, algorithm(advantage), Ranks(), kl_coef=0.1)
    ) == approximately(expected)


def test_a_kl_in_the_reward_comes_off_every_token_of_a_group_estimate() -> None:
    first, second = packed_as("rloo", *SPLIT)
    batches = [with_kl(first, [9.0, 0.5, -1.0, 9.0, 0.0]), with_kl(second, [9.0, 0.0, 9.0, 2.0])]
    # -β·KL = (-0.05, 0.1), 0, 0 and -0.2; its return-to-go with γ = 0.5 is (-0.05 + 0.05, 0.1), 0, 0, -0.2.
    rloo = add_advantages(batches, algorithm("rloo", gamma=0.5), Ranks(), kl_coef=0.1)
    assert advantages_of(rloo) == approximately([[0, -2.0, -1.9, 0, 0], [0, 0, 0, 1.8]])
    in_loss = add_advantages(
        batches, algorithm("rloo", gamma=0.5, kl_in="loss", kl_estimator="k2"), Ranks(), kl_coef=0.1
    )
    assert advantages_of(in_loss) == approximately([[0, -2, -2, 0, 0], [0, 0, 0, 2]])


def concatenated(batches: Sequence[PolicyBatch]) -> Tensor:
    """The advantages of loss tokens by (group, score, position): whatever the packing, the same order."""
    found = {}
    for batch in batches:
        assert batch.advantages is not None
        for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
            if batch.group_ids[i] >= 0:
                found[int(batch.group_ids[i]), float(batch.scores[i])] = batch.advantages[start:end]
    return torch.cat([found[key] for key in sorted(found)])


@pytest.mark.parametrize("advantage", ["gae", "reinforce_pp", *GROUP_ESTIMATORS])
def test_packing_and_padding_change_no_advantage(advantage: str) -> None:
    samples = [(0, 1.0, 2), (1, 2.0, 1), (0, 3.0, 3), (1, -1.0, 2), (0, 0.5, 1)]

    def prepared(batch: PolicyBatch) -> PolicyBatch:
        batch = with_kl(batch, [0.0] * batch.num_tokens)
        return replace(batch, values=torch.zeros(batch.num_tokens)) if advantage == "gae" else batch

    whole = [prepared(batch) for batch in packed_as(advantage, samples)]
    padding = padding_samples()
    last, middle, first = packed_as(advantage, samples[3:], samples[2:3], samples[:2])
    parts = [last, padding, middle, first, padding]
    expected = concatenated(add_advantages(whole, algorithm(advantage), Ranks(), kl_coef=0.1))
    found = concatenated(
        add_advantages([prepared(part) for part in parts], algorithm(advantage), Ranks(), kl_coef=0.1)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.any()


@pytest.mark.parametrize("advantage", ["reinforce_pp", *GROUP_ESTIMATORS])
def test_a_rank_without_samples(advantage: str) -> None:
    done = add_advantages([padding_samples(), padding_samples()], algorithm(advantage), Ranks(), kl_coef=0.1)
    assert advantages_of(done) == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("advantage", ["gae", "reinforce_pp"])
def test_nobody_is_compared_without_need(advantage: str) -> None:
    samples = [make_sample(score=1.0), make_sample(score=2.0)]
    assert with_group_advantages(samples, advantage) == samples
    assert with_group_advantages([], "grpo") == []


def test_a_sample_that_was_never_compared_spoils_the_loss_for_all_to_see() -> None:
    [batch] = add_advantages([packed((0, 1.0, 2))], algorithm("grpo"), Ranks(), kl_coef=0.1)
    assert batch.advantages is not None and batch.advantages[1:].isnan().all()


def test_whitening_reaches_over_ranks() -> None:
    """Returns here are 1, 1 and -1; another rank brings two tokens of return 5."""

    class WithAnother(Ranks):
        def sum_tensor(self, values: Tensor) -> Tensor:
            return values + torch.tensor([2.0, 10.0, 50.0], dtype=torch.float64)  # count, sum, sum of squares

    batches = [packed((0, 1.0, 2), (1, -1.0, 1))]
    [batch] = add_advantages(batches, algorithm("reinforce_pp"), WithAnother(), kl_coef=0.1)
    # Over 1, 1, -1, 5, 5: mean 2.2, variance 53/5 - 4.84 = 5.76, deviation 2.4
    assert advantages_of([batch]) == approximately([[0.0, -0.5, -0.5, 0.0, -1.3333333]])


def test_whitening_is_over_the_mini_batches_of_the_step_together() -> None:
    """The same five tokens, in two mini-batches of which the second has a padding batch."""
    first = packed((0, 1.0, 2), (1, -1.0, 1))
    second = packed((2, 5.0, 2))
    mini_batches = [[first], [second, padding_samples()]]
    found = with_token_advantages(mini_batches, algorithm("reinforce_pp"), Ranks(), kl_coef=0.1)
    assert [len(batches) for batches in found] == [1, 2]
    # (5 - 2.2)/2.4 = 1.1666667
    assert advantages_of(found[0]) == approximately([[0.0, -0.5, -0.5, 0.0, -1.3333333]])
    assert advantages_of(found[1]) == approximately([[0.0, 1.1666667, 1.1666667], [0.0, 0.0]])
