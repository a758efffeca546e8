"""Advantage estimators: from scores, KL and values to one advantage per token that the policy produced.

Two families, with their traits in `registry.ESTIMATORS`. Per-token estimators (`gae`, `reinforce_pp`) work on
one packed stream. Group estimators compare the samples of one prompt, per sample [N], before balancing
separates the members of a group; `spread` lays the result out over tokens. "Policy token" = a token with
loss_mask 1; tokens in between that the policy did not produce (tools, environment) are skipped: no reward, no
discount, no value. All results are fp32, constants to autograd, and 0 outside the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked
from rayrlhf.algorithms.registry import ESTIMATORS
from rayrlhf.batch import sequence_ids_of

GROUP_STD_EPS = 1e-6


# Per token


@torch.no_grad()
def token_rewards(
    scores: Tensor,  # [S]
    kl: Tensor | None,  # [T]
    kl_coef: float,
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
) -> Tensor:
    """r_t = -β·KL_t on policy tokens, plus the score on the sequence's last policy token, [T].

    arXiv 1909.08593. `kl=None` means no KL in the reward. A sequence without policy tokens gets no reward at
    all.
    """
    index, sequence, is_last = _policy_tokens(loss_mask, cu_seqlens)
    rewards = torch.zeros_like(loss_mask, dtype=torch.float32)
    if kl is not None:
        rewards = -kl_coef * masked(kl, loss_mask)
    rewards[index[is_last]] += scores.float()[sequence[is_last]]
    return rewards


@torch.no_grad()
def reinforce_pp(
    rewards: Tensor,  # [T]
    values: None,
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, None]:
    """REINFORCE++ (arXiv 2501.03262) before whitening: the return-to-go, without a critic's baseline."""
    return return_to_go(rewards, loss_mask, cu_seqlens, gamma=gamma), None


@torch.no_grad()
def gae(
    rewards: Tensor,  # [T]
    values: Tensor,  # [T] value of the state before token t
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): (advantages [T], returns [T]).

    δ_t = r_t + γ·V_{t+1} - V_t, A_t = δ_t + γλ·A_{t+1}, returns = A + V. t+1 is the next *policy*
    token of the same sequence; after the last one V and A are 0 (the episode has ended).
    """
    index, sequence, is_last = _policy_tokens(loss_mask, cu_seqlens)
    value = values.float()[index]
    next_value = torch.where(is_last, 0.0, value.roll(-1))
    delta = rewards.float()[index] + gamma * next_value - value
    advantage = _discounted_suffix_sums(delta, sequence, gamma * lam)
    blank = torch.zeros_like(loss_mask, dtype=torch.float32)
    return blank.index_copy(0, index, advantage), blank.index_copy(0, index, advantage + value)


@torch.no_grad()
def return_to_go(
    rewards: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    gamma: float,
) -> Tensor:
    """Σ_{k≥t} γ^(k-t)·r_k over the policy tokens from t to the end of the sequence, [T].

    k - t counts policy tokens, as in `gae`, of which this is the case V = 0, λ = 1.
    """
    index, sequence, _ = _policy_tokens(loss_mask, cu_seqlens)
    returns = _discounted_suffix_sums(rewards.float()[index], sequence, gamma)
    return torch.zeros_like(loss_mask, dtype=torch.float32).index_copy(0, index, returns)


def _policy_tokens(loss_mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The P policy tokens: position in the stream [P], sequence [P], is it the last of its sequence [P]."""
    index = loss_mask.nonzero().squeeze(-1)
    sequence = sequence_ids_of(cu_seqlens)[index]
    is_last = torch.ones_like(index, dtype=torch.bool)
    is_last[:-1] = sequence[1:] != sequence[:-1]
    return index, sequence, is_last


def _discounted_suffix_sums(x: Tensor, sequence: Tensor, discount: float) -> Tensor:
    """y_i = x_i + discount·y_{i+1} within each sequence, [P], for tokens ordered by sequence.

    By doubling: once y_i covers the n tokens from i, adding discount^n · y_{i+n} makes it cover 2n. That is
    log2(P) vector operations for all sequences at once, without padding them to one length.
    """
    reach = 1
    while reach < x.numel():
        same_sequence = sequence[reach:] == sequence[:-reach]
        ahead = torch.where(same_sequence, discount**reach * x[reach:], 0.0)
        x = x + torch.nn.functional.pad(ahead, (0, reach))
        reach *= 2
    return x


# Per sample, relative to the other samples of its prompt


def rloo(scores: Tensor, group_mean: Tensor, group_std: Tensor, group_size: Tensor) -> Tensor:
    """score - mean of the *other* samples of its group = (score - group mean)·n/(n-1) (arXiv 2402.14740)."""
    return (scores - group_mean) * group_size / (group_size - 1.0)


def grpo(scores: Tensor, group_mean: Tensor, group_std: Tensor, group_size: Tensor) -> Tensor:
    """(score - group mean)/(group std + 1e-6), std of ddof 1; a constant group gives 0 (arXiv 2402.03300)."""
    return (scores - group_mean) / (group_std + GROUP_STD_EPS)


def centred(scores: Tensor, group_mean: Tensor, group_std: Tensor, group_size: Tensor) -> Tensor:
    """score - group mean: Dr. GRPO (arXiv 2503.20783), REINFORCE++-baseline before whitening (2501.03262)."""
    return scores - group_mean


@torch.no_grad()
def group_advantages(name: str, scores: Tensor, group_ids: Tensor) -> Tensor:
    """Advantage of every sample relative to its group, [N] in fp32; scores [N], group_ids [N] (any integers).

    Bit-identical for any order of the samples. Whitening, if the estimator has it, is done afterwards over
    tokens.

    Raises:
        ValueError: for an unknown name, a score that is not finite (it would invalidate its whole group), or
        a
            group of one with rloo and grpo, which have no baseline for it.
    """
    estimator = ESTIMATORS.get(name)
    if estimator is None or not estimator.needs_group:
        of_groups = [known for known, entry in ESTIMATORS.items() if entry.needs_group]
        raise ValueError(f"advantage={name!r} is not a group estimator; these are: {', '.join(of_groups)}")
    scores = scores.float().double()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            "scores must be finite: drop samples whose reward failed before taking group baselines"
        )
    groups, member_of, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if not estimator.defined_for_one and bool((sizes == 1).any()):
        raise ValueError(
            f"groups {groups[sizes == 1][:5].tolist()} have one sample but advantage={name} needs >= 2 "
            "(a group of one has no baseline): raise rollout.group_size, or drop a sample that lost the "
            "others of its group"
        )
    # Addition rounds differently in another order; ascending scores fix the order within a group.
    order = scores.argsort()
    size = sizes.double()
    zeros = torch.zeros_like(size)
    mean = zeros.index_add(0, member_of[order], scores[order]) / size
    squares = (scores - mean[member_of]).square()
    std = (zeros.index_add(0, member_of[order], squares[order]) / (size - 1.0).clamp_min(1.0)).sqrt()
    return estimator.function(scores, mean[member_of], std[member_of], size[member_of]).float()


@torch.no_grad()
def spread(per_sequence: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each sequence's value [S] on all of its policy tokens, [T] in fp32."""
    return masked(per_sequence[sequence_ids_of(cu_seqlens)], loss_mask)


# Whitening, in two halves so that the caller can add up the moments over micro-batches and ranks in between


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of `x` [T] over the mask, [3] in float64; moments of parts add up."""
    kept = masked(x, mask).double()
    return torch.stack([(mask > 0).sum().double(), kept.sum(), kept.square().sum()])


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean)/sqrt(variance + eps) on the mask, [T] in fp32, from the global `moments` [3].

    Population variance. All zeros when no token is masked.
    """
    count, total, total_squares = moments.to(x.device).double().unbind()
    mean = total / count.clamp_min(1.0)
    variance = (total_squares / count.clamp_min(1.0) - mean.square()).clamp_min(0.0)
    return masked((x.double() - mean) * (variance + eps).rsqrt(), mask)
