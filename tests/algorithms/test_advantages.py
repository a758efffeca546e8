"""Advantages: numbers by hand, float64 loops as an independent implementation, and order independence."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms.advantages import (
    gae,
    group_advantages,
    masked_moments,
    return_to_go,
    spread,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.registry import ESTIMATORS
from rayrlhf.batch import cu_seqlens_of

NAN, INF = math.nan, math.inf
GROUP_ADVANTAGES = [name for name, estimator in ESTIMATORS.items() if estimator.needs_group]

# Four sequences: A ordinary; B with a tool token between its policy tokens and another behind them; C a
# padded row; D with a single policy token. Outside the mask stands garbage throughout.
#                       |------ A -----|  |--------- B --------|  |-- C --|  |- D -|
MASK = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
CU_SEQLENS = cu_seqlens_of([4, 5, 2, 2])


def test_token_rewards_by_hand() -> None:
    kl = torch.tensor([NAN, INF, 0.5, -0.25, NAN, 1.0, INF, 2.0, NAN, NAN, INF, NAN, 0.0])
    scores = torch.tensor([2.0, -1.0, NAN, 0.5])  # C never learns: its score must not matter
    rewards = token_rewards(scores, kl, 0.1, MASK, CU_SEQLENS)
    # A: -0.1·0.5, then -0.1·(-0.25) + 2
    # B: -0.1·1, then -0.1·2 - 1, not on the tool token behind
    # D: 0 + 0.5
    expected = [0, 0, -0.05, 2.025, 0, -0.1, 0, -1.2, 0, 0, 0, 0, 0.5]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)
    without_kl = token_rewards(scores, None, 0.1, MASK, CU_SEQLENS)
    assert without_kl.tolist() == [0, 0, 0, 2.0, 0, 0, 0, -1.0, 0, 0, 0, 0, 0.5]


REWARDS = torch.tensor([NAN, 9.0, 1.0, 2.0, INF, 0.0, 50.0, 3.0, NAN, NAN, INF, NAN, 0.5])
VALUES = torch.tensor([NAN, 9.0, 0.5, 1.0, INF, 2.0, 100.0, 1.0, NAN, NAN, INF, NAN, 0.25])


def test_gae_by_hand() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, CU_SEQLENS, gamma=0.9, lam=0.5)
    # A: δ = [1 + 0.9·1 - 0.5, 2 - 1] = [1.4, 1]      A = [1.4 + 0.45·1, 1]       = [1.85, 1]
    # B: δ = [0 + 0.9·1 - 2, 3 - 1]   = [-1.1, 2]     A = [-1.1 + 0.45·2, 2]      = [-0.2, 2], past the tool
    # D: δ = 0.5 - 0.25                                                           = 0.25
    expected_advantages = [0, 0, 1.85, 1.0, 0, -0.2, 0, 2.0, 0, 0, 0, 0, 0.25]
    expected_returns = [0, 0, 2.35, 2.0, 0, 1.8, 0, 3.0, 0, 0, 0, 0, 0.5]  # A + V
    assert advantages.tolist() == pytest.approx(expected_advantages, abs=1e-6)
    assert returns.tolist() == pytest.approx(expected_returns, abs=1e-6)


def test_return_to_go_by_hand() -> None:
    # A: 1 + 0.5·2 = 2, 2      B: 0 + 0.5·3 = 1.5 (the tool token costs no discount), 3      D: 0.5
    returns = return_to_go(REWARDS, MASK, CU_SEQLENS, gamma=0.5)
    assert returns.tolist() == [0, 0, 2.0, 2.0, 0, 1.5, 0, 3.0, 0, 0, 0, 0, 0.5]


def test_empty_mask_gives_zeros() -> None:
    garbage, mask = torch.full((13,), NAN), torch.zeros(13)
    zeros = [0.0] * 13
    assert token_rewards(torch.full((4,), NAN), garbage, 0.1, mask, CU_SEQLENS).tolist() == zeros
    assert [x.tolist() for x in gae(garbage, garbage, mask, CU_SEQLENS, gamma=1.0, lam=1.0)] == [zeros, zeros]
    assert return_to_go(garbage, mask, CU_SEQLENS, gamma=1.0).tolist() == zeros
    assert spread(torch.full((4,), NAN), mask, CU_SEQLENS).tolist() == zeros
    assert whiten(garbage, mask, masked_moments(garbage, mask)).tolist() == zeros


def test_a_constant_reward_over_a_long_response() -> None:
    # gamma = 1, λ = 1, V = 0, r = 1: the token with n policy tokens from it to the end has A = n, exactly.
    length = 3000
    advantages, _ = gae(
        torch.ones(length),
        torch.zeros(length),
        torch.ones(length),
        cu_seqlens_of([length]),
        gamma=1.0,
        lam=1.0,
    )
    assert advantages.tolist() == list(range(length, 0, -1))


def test_results_are_constants_to_autograd() -> None:
    values = torch.ones(13, requires_grad=True)
    assert not any(x.requires_grad for x in gae(torch.ones(13), values, MASK, CU_SEQLENS, gamma=1.0, lam=1.0))
    assert not token_rewards(torch.ones(4), values, 0.1, MASK, CU_SEQLENS).requires_grad


def loops(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, lengths: list[int], gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and discounted returns in float64, from the definitions: sums over later policy tokens."""
    advantages, returns_to_go = np.zeros(mask.size), np.zeros(mask.size)
    start = 0
    for length in lengths:
        policy = [t for t in range(start, start + length) if mask[t]]
        for i, t in enumerate(policy):
            for j in range(i, len(policy)):
                following = values[policy[j + 1]] if j + 1 < len(policy) else 0.0
                delta = rewards[policy[j]] + gamma * following - values[policy[j]]
                advantages[t] += (gamma * lam) ** (j - i) * delta
                returns_to_go[t] += gamma ** (j - i) * rewards[policy[j]]
        start += length
    return advantages, returns_to_go


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_per_token_estimators_match_float64_loops(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    mask = rng.random(total) < rng.choice([0.0, 0.3, 0.7, 1.0])
    rewards, values = (np.where(mask, rng.normal(size=total), NAN) for _ in range(2))
    expected, expected_to_go = loops(rewards, values, mask, lengths, gamma, lam)

    cu_seqlens = cu_seqlens_of(lengths)
    t_rewards, t_values, t_mask = (torch.tensor(x, dtype=torch.float32) for x in (rewards, values, mask))
    advantages, returns = gae(t_rewards, t_values, t_mask, cu_seqlens, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(returns, expected + np.where(mask, values, 0.0), atol=1e-5, rtol=1e-5)
    to_go = return_to_go(t_rewards, t_mask, cu_seqlens, gamma=gamma)
    np.testing.assert_allclose(to_go, expected_to_go, atol=1e-5, rtol=1e-5)

    # Tool tokens take no part: cut everything out that the policy did not produce, and nothing changes.
    kept = np.add.reduceat(mask.astype(int), np.cumsum([0, *lengths[:-1]])).tolist()
    only_policy, _ = gae(
        t_rewards[mask], t_values[mask], torch.ones(sum(kept)), cu_seqlens_of(kept), gamma=gamma, lam=lam
    )
    torch.testing.assert_close(only_policy, advantages[mask], atol=1e-6, rtol=1e-6)


# Two groups, interleaved as balancing over ranks leaves them.
SCORES = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0])
GROUP_IDS = torch.tensor([7, 3, 7, 3, 7])
# group 7: [1, 2, 6], mean 3, deviations [-2, -1, 3], ddof-1 variance 14/2 = 7
# group 3: [0, 4], mean 2, deviations [-2, 2], ddof-1 variance 8/1 = 8
BY_HAND = {
    "rloo": [
        1 - 8 / 2,
        0 - 4,
        2 - 7 / 2,
        4 - 0,
        6 - 3 / 2,
    ],  # the mean of the others: (2+6)/2, 4, (1+6)/2, 0, (1+2)/2
    "grpo": [
        -2 / 7**0.5,
        -2 / 8**0.5,
        -1 / 7**0.5,
        2 / 8**0.5,
        3 / 7**0.5,
    ],  # 1e-6 relative to 2.6 is below the tolerance
    "dr_grpo": [-2.0, -2.0, -1.0, 2.0, 3.0],
    "reinforce_pp_baseline": [-2.0, -2.0, -1.0, 2.0, 3.0],
}


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_group_advantages_by_hand(name: str) -> None:
    assert group_advantages(name, SCORES, GROUP_IDS).tolist() == pytest.approx(BY_HAND[name], rel=2e-6)


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_a_constant_group_gives_exactly_zero(name: str) -> None:
    # 0.1 is not a binary fraction: a mean taken carelessly would leave a rest that grpo's 1e-6 blows up.
    for size in (2, 3, 7):
        assert group_advantages(name, torch.full((size,), 0.1), torch.zeros(size)).tolist() == [0.0] * size


def test_grpo_epsilon_bounds_a_nearly_constant_group() -> None:
    # Scores 0 and 2e-6: mean 1e-6, std 1e-6·sqrt(2), so -+1e-6/(1.4142e-6 + 1e-6) = -+0.41421
    result = group_advantages("grpo", torch.tensor([0.0, 2e-6]), torch.zeros(2))
    assert result.tolist() == pytest.approx([-0.41421, 0.41421], rel=1e-4)


def test_a_group_of_one() -> None:
    scores, group_ids = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 9])
    for name in ("rloo", "grpo"):
        with pytest.raises(
            ValueError, match=rf"groups \[9\] have one sample but advantage={name} needs >= 2"
        ):
            group_advantages(name, scores, group_ids)
    for name in ("dr_grpo", "reinforce_pp_baseline"):  # defined, and says nothing: score - its own mean
        assert group_advantages(name, scores, group_ids).tolist() == [-0.5, 0.5, 0.0]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        group_advantages("dr_grpo", torch.tensor([1.0, NAN]), torch.zeros(2))
    with pytest.raises(ValueError, match="advantage='gae' is not a group estimator"):
        group_advantages("gae", SCORES, GROUP_IDS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(GROUP_ADVANTAGES)),
    sizes=st.lists(st.integers(2, 8), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_group_advantages_match_loops_in_any_order(name: str, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    group_ids = np.repeat(rng.choice(1000, len(sizes), replace=False), sizes)
    scores = rng.normal(size=group_ids.size).astype(np.float32)
    expected = []
    for i, group in enumerate(group_ids):
        members = [float(s) for s, g in zip(scores, group_ids, strict=True) if g == group]
        others = [float(s) for j, s in enumerate(scores) if group_ids[j] == group and j != i]
        baseline = np.mean(others) if name == "rloo" else np.mean(members)
        scale = np.std(members, ddof=1) + 1e-6 if name == "grpo" else 1.0
        expected.append((float(scores[i]) - baseline) / scale)

    t_scores, t_groups = torch.tensor(scores), torch.tensor(group_ids)
    result = group_advantages(name, t_scores, t_groups)
    np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)
    order = torch.tensor(rng.permutation(group_ids.size))
    assert torch.equal(group_advantages(name, t_scores[order], t_groups[order]), result[order])  # bit for bit


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_the_order_of_a_group_does_not_even_change_rounding(name: str) -> None:
    # 1e17 + 1 - 1e17 is 0 in float64 but 1e17 - 1e17 + 1 is 1: a naive sum depends on the order of the ranks.
    scores = [1e17, -1e17, 1.0]
    by_order = []
    for order in permutations(range(3)):
        result = group_advantages(name, torch.tensor([scores[i] for i in order]), torch.zeros(3))
        by_order.append({scores[i]: value for i, value in zip(order, result.tolist(), strict=True)})
    assert all(result == by_order[0] for result in by_order)


def test_spread_by_hand() -> None:
    result = spread(torch.tensor([1.5, -2.0, NAN, 4.0]), MASK, CU_SEQLENS)
    assert result.tolist() == [0, 0, 1.5, 1.5, 0, -2.0, 0, -2.0, 0, 0, 0, 0, 4.0]


def test_whitening_by_hand_over_two_ranks() -> None:
    # Masked values 1, 3 on one rank and 5, 7 on the other: count 4, sum 16, squares 1+9+25+49 = 84.
    # mean 4, population variance 84/4 - 16 = 5, so ∓3/sqrt(5) = ∓1.3416408 and ∓1/sqrt(5) = ∓0.4472136
    here, there = torch.tensor([1.0, NAN, 3.0]), torch.tensor([INF, 5.0, 7.0])
    mask_here, mask_there = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    moments = masked_moments(here, mask_here) + masked_moments(there, mask_there)
    assert moments.dtype == torch.float64
    assert moments.tolist() == [4.0, 16.0, 84.0]
    assert whiten(here, mask_here, moments).tolist() == pytest.approx([-1.3416408, 0.0, -0.4472136])
    assert whiten(there, mask_there, moments).tolist() == pytest.approx([0.0, 0.4472136, 1.3416408])


def test_whitening_constants_gives_zeros() -> None:
    for values in ([0.1] * 7, [1e4 + 0.1] * 3, [5.0]):  # the last: a single token has no variance either
        x, mask = torch.tensor(values), torch.ones(len(values))
        assert whiten(x, mask, masked_moments(x, mask)).tolist() == pytest.approx(
            [0.0] * len(values), abs=1e-6
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    mean=st.floats(-100, 100),
    std=st.floats(0.1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_whitening_matches_numpy_however_it_is_split(
    lengths: list[int], mean: float, std: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(n) < 0.7 for n in lengths]
    parts = [rng.normal(mean, std, n).astype(np.float32) for n in lengths]
    kept = np.concatenate([p[m] for p, m in zip(parts, masks, strict=True)]).astype(np.float64)
    tensors = [
        (torch.tensor(np.where(m, p, NAN)), torch.tensor(m).float())
        for p, m in zip(parts, masks, strict=True)
    ]
    moments = torch.stack([masked_moments(x, m) for x, m in tensors]).sum(0)
    result = torch.cat([whiten(x, m, moments)[m > 0] for x, m in tensors])
    assert all((whiten(x, m, moments)[m == 0] == 0).all() for x, m in tensors)
    if kept.size:
        np.testing.assert_allclose(
            result, (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8), atol=1e-5, rtol=1e-5
        )


def test_the_table_agrees_with_the_functions() -> None:
    assert {name for name, estimator in ESTIMATORS.items() if estimator.needs_group} == BY_HAND.keys()
    assert [name for name, estimator in ESTIMATORS.items() if estimator.needs_critic] == ["gae"]
    whitened = {name for name, estimator in ESTIMATORS.items() if estimator.whitened}
    assert whitened == {"gae", "reinforce_pp", "reinforce_pp_baseline"}
    for_one = {name for name, estimator in ESTIMATORS.items() if estimator.defined_for_one}
    assert for_one == {"dr_grpo", "reinforce_pp_baseline"}


def test_reinforce_pp_is_the_return_to_go_without_returns() -> None:
    function = ESTIMATORS["reinforce_pp"].function
    advantages, returns = function(REWARDS, None, MASK, CU_SEQLENS, gamma=0.5, lam=0.3)
    # As test_return_to_go_by_hand: λ has no part in it, and there is no critic to regress on returns.
    assert advantages.tolist() == [0, 0, 2.0, 2.0, 0, 1.5, 0, 3.0, 0, 0, 0, 0, 0.5]
    assert returns is None
