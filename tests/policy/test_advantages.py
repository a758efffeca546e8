"""Advantages of a step in one process; what other ranks would bring is put in by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from rayrlhf.policy.advantages import add_advantages, with_group_advantages
from torch import Tensor

from rayrlhf.batch import PackedBatch, pack_samples, padding_samples
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.policy import advantages as advantages_module
from tests.samples import make_prompt, make_sample

GROUP_ESTIMATORS = ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"]


# One-token prompts, so that position 0 of each sequence is masked and the rest is the policy's.


Row = tuple[int, float, int]  # group, score, response tokens


def packed(*rows: Row) -> PackedBatch:
    [batch] = packed_apart("gae", rows)
    return batch


def packed_apart(advantage: str, *batches: Sequence[Row]) -> list[PackedBatch]:
    """Samples whose groups were whole before they were packed into these batches."""
    samples = [
        make_sample(range(tokens), prompt=make_prompt([7]), group_id=group, score=score)
        for rows in batches
        for group, score, tokens in rows
    ]
    left = iter(with_group_advantages(samples, advantage))
    return [pack_samples(list(islice(left, len(rows)))) for rows in batches]


def with_kl(batch: PackedBatch, kl: list[float]) -> PackedBatch:
    """Log-probabilities whose k1 estimate is `kl` [T]."""
    ref = torch.linspace(-1.0, -2.0, batch.num_tokens)
    return batch.with_fields(old_logprobs=ref + torch.tensor(kl), ref_logprobs=ref)


def advantages_of(batches: Sequence[PackedBatch]) -> list[list[float]]:
    found = [batch.advantages for batch in batches]
    return [advantages.tolist() for advantages in found if advantages is not None]


def approximately(rows: list[list[float]]) -> list[Any]:
    return [pytest.approx(row, abs=1e-5) for row in rows]


def algorithm(advantage: str, **fields: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"advantage": advantage, **fields})


def critics_batch() -> PackedBatch:
    batch = with_kl(packed((0, 1.0, 2), (1, -1.0, 1)), [9.0, 0.5, -1.0, 9.0, 0.0])
    return batch.with_fields(values=torch.tensor([0.0, 0.2, 0.4, 0.0, -0.5]))


# β = 0.1: r = (-0.05, 0.1 + 1) and (-1). With γ = 1, λ = 0.5: δ = (-0.05 + 0.4 - 0.2, 1.1 - 0.4) = (0.15,
# 0.7), so A = (0.15 + 0.5 · 0.7, 0.7) = (0.5, 0.7), and A = -1 + 0.5 in the second. Returns are A + V.
RAW = [0.0, 0.5, 0.7, 0.0, -0.5]
RETURNS = [0.0, 0.7, 1.1, 0.0, -1.0]
# Over (0.5, 0.7, -0.5): mean 0.7/3, variance 0.99/3 - (0.7/3)² = 0.2755556, deviation 0.5249339.
WHITE = [0.0, 0.5080010, 0.8890017, 0.0, -1.3970027]


@pytest.mark.parametrize("whiten, expected", [(False, RAW), (True, WHITE)])
def test_gae_by_hand(whiten: bool, expected: list[float]) -> None:
    gae = algorithm("gae", lam=0.5, whiten_advantages=whiten)
    [batch] = add_advantages([critics_batch()], gae, kl_coef=0.1)
    assert advantages_of([batch]) == approximately([expected])
    assert batch.returns is not None and batch.returns.tolist() == pytest.approx(RETURNS, abs=1e-6)


def test_a_kl_in_the_loss_is_not_in_the_reward() -> None:
    gae = algorithm("gae", lam=0.5, whiten_advantages=False, kl_in="loss", kl_estimator="k2")
    [batch] = add_advantages([critics_batch()], gae, kl_coef=0.1)
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
    done = add_advantages([batch], reinforce_pp, kl_coef=0.1)
    assert advantages_of(done) == approximately([expected])
    assert done[0].returns is None


# Two groups whose members lie apart: 1 and 3 in group 0, twice 2 in group 1.
APART = ((0, 1.0, 2), (1, 2.0, 1)), ((1, 2.0, 1), (0, 3.0, 1))
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
    batches = packed_apart(advantage, *APART)
    assert advantages_of(add_advantages(batches, algorithm(advantage), kl_coef=0.1)) == approximately(
        expected
    )


def test_a_kl_in_the_reward_comes_off_every_token_of_a_group_estimate() -> None:
    first, second = packed_apart("rloo", *APART)
    batches = [with_kl(first, [9.0, 0.5, -1.0, 9.0, 0.0]), with_kl(second, [9.0, 0.0, 9.0, 2.0])]
    # -β·KL = (-0.05, 0.1), 0, 0 and -0.2; its return-to-go with γ = 0.5 is (-0.05 + 0.05, 0.1), 0, 0, -0.2.
    rloo = add_advantages(batches, algorithm("rloo", gamma=0.5), kl_coef=0.1)
    assert advantages_of(rloo) == approximately([[0, -2.0, -1.9, 0, 0], [0, 0, 0, 1.8]])
    in_loss = add_advantages(
        batches, algorithm("rloo", gamma=0.5, kl_in="loss", kl_estimator="k2"), kl_coef=0.1
    )
    assert advantages_of(in_loss) == approximately([[0, -2, -2, 0, 0], [0, 0, 0, 2]])


def concatenated(batches: Sequence[PackedBatch]) -> Tensor:
    """The advantages of learnt tokens by (group, score, position): whatever the packing, the same order."""
    found = {}
    for batch in batches:
        assert batch.group_ids is not None and batch.scores is not None and batch.advantages is not None
        for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
            if batch.group_ids[i] >= 0:
                found[int(batch.group_ids[i]), float(batch.scores[i])] = batch.advantages[start:end]
    return torch.cat([found[key] for key in sorted(found)])


@pytest.mark.parametrize("advantage", ["gae", "reinforce_pp", *GROUP_ESTIMATORS])
def test_packing_and_filling_change_nothing(advantage: str) -> None:
    samples = [(0, 1.0, 2), (1, 2.0, 1), (0, 3.0, 3), (1, -1.0, 2), (0, 0.5, 1)]

    def prepared(batch: PackedBatch) -> PackedBatch:
        batch = with_kl(batch, [0.0] * batch.num_tokens)
        return batch.with_fields(values=torch.zeros(batch.num_tokens)) if advantage == "gae" else batch

    whole = [prepared(batch) for batch in packed_apart(advantage, samples)]
    filling = padding_samples(0)
    last, middle, first = packed_apart(advantage, samples[3:], samples[2:3], samples[:2])
    parts = [last, filling, middle, first, filling]
    expected = concatenated(add_advantages(whole, algorithm(advantage), kl_coef=0.1))
    found = concatenated(
        add_advantages([prepared(part) for part in parts], algorithm(advantage), kl_coef=0.1)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.any()


@pytest.mark.parametrize("advantage", ["reinforce_pp", *GROUP_ESTIMATORS])
def test_a_rank_without_samples(advantage: str) -> None:
    done = add_advantages([padding_samples(0), padding_samples(0)], algorithm(advantage), kl_coef=0.1)
    assert advantages_of(done) == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("advantage", ["gae", "reinforce_pp"])
def test_nobody_is_compared_without_need(advantage: str) -> None:
    samples = [make_sample(score=1.0), make_sample(score=2.0)]
    assert with_group_advantages(samples, advantage) == samples
    assert with_group_advantages([], "grpo") == []


def test_a_sample_that_was_never_compared_spoils_the_loss_for_all_to_see() -> None:
    [batch] = add_advantages([packed((0, 1.0, 2))], algorithm("grpo"), kl_coef=0.1)
    assert batch.advantages is not None and batch.advantages[1:].isnan().all()


def test_whitening_reaches_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns here are 1, 1 and -1; another rank brings two tokens of return 5."""
    elsewhere = torch.tensor([2.0, 10.0, 50.0], dtype=torch.float64)  # count, sum, sum of squares
    monkeypatch.setattr(advantages_module.collectives, "sum_over_ranks", lambda moments: moments + elsewhere)
    [batch] = add_advantages([packed((0, 1.0, 2), (1, -1.0, 1))], algorithm("reinforce_pp"), kl_coef=0.1)
    # Over 1, 1, -1, 5, 5: mean 2.2, variance 53/5 - 4.84 = 5.76, deviation 2.4
    assert advantages_of([batch]) == approximately([[0.0, -0.5, -0.5, 0.0, -1.3333333]])
