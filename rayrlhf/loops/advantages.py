"""Advantages of a step's micro-batches: token rewards, baselines from groups, whitening over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayrlhf.algorithms.advantages import (
    ADVANTAGES,
    gae,
    group_advantages,
    masked_moments,
    return_to_go,
    spread,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.kl import token_kl
from rayrlhf.batch import PackedBatch
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.train import collectives


def add_advantages(
    batches: Sequence[PackedBatch], algorithm: AlgorithmConfig, *, kl_coef: float
) -> list[PackedBatch]:
    """Rewards, advantages and (with a critic) returns; whitened over all ranks where the estimator wants it.

    `batches` are all of this rank's micro-batches of the step, so that a group is compared as a whole.
    Collective.
    """
    if ADVANTAGES[algorithm.advantage].needs_group:
        estimated = _against_group(batches, algorithm, kl_coef)
    else:
        estimated = [_per_token(batch, algorithm, kl_coef) for batch in batches]
    if not (ADVANTAGES[algorithm.advantage].whitened and algorithm.whiten_advantages):
        return estimated
    local = torch.stack([masked_moments(_advantages(b), b.loss_mask) for b in estimated]).sum(0)
    moments = collectives.sum_over_ranks(local)
    return [b.with_fields(advantages=whiten(_advantages(b), b.loss_mask, moments)) for b in estimated]


def _advantages(batch: PackedBatch) -> torch.Tensor:
    assert batch.advantages is not None
    return batch.advantages


def _penalty(batch: PackedBatch, algorithm: AlgorithmConfig) -> torch.Tensor | None:
    """KL per token [T] where it belongs in the reward; None where it is off or in the loss."""
    if batch.ref_logprobs is None or algorithm.kl_in != "reward":
        return None
    assert batch.old_logprobs is not None
    return token_kl(algorithm.kl_estimator, batch.old_logprobs, batch.ref_logprobs, batch.loss_mask)


def _per_token(batch: PackedBatch, algorithm: AlgorithmConfig, kl_coef: float) -> PackedBatch:
    assert batch.scores is not None
    mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
    rewards = token_rewards(batch.scores, _penalty(batch, algorithm), kl_coef, mask, cu_seqlens)
    if batch.values is None:
        return batch.with_fields(advantages=return_to_go(rewards, mask, cu_seqlens, gamma=algorithm.gamma))
    advantages, returns = gae(
        rewards, batch.values, mask, cu_seqlens, gamma=algorithm.gamma, lam=algorithm.lam
    )
    return batch.with_fields(advantages=advantages, returns=returns)


def _against_group(
    batches: Sequence[PackedBatch], algorithm: AlgorithmConfig, kl_coef: float
) -> list[PackedBatch]:
    """Baselines from the groups of all ranks; a KL penalty in the reward comes off per token, as return-
    to-go.
    """
    mine = [
        (int(group), float(score))
        for batch in batches
        for group, score in zip(_present(batch.group_ids), _present(batch.scores), strict=True)
    ]
    everyone = collectives.gather_lists([mine])
    first = sum(map(len, everyone[: collectives.rank()]))
    real = [sample for part in everyone for sample in part if sample[0] >= 0]
    groups, scores = torch.tensor([group for group, _ in real]), torch.tensor([score for _, score in real])
    known = iter(group_advantages(algorithm.advantage, scores, groups).tolist())
    estimates = [next(known) if group >= 0 else 0.0 for part in everyone for group, _ in part][first:]
    result: list[PackedBatch] = []
    for batch in batches:
        per_sequence = torch.tensor(estimates[: batch.num_sequences], device=batch.loss_mask.device)
        del estimates[: batch.num_sequences]
        advantages = spread(per_sequence, batch.loss_mask, batch.cu_seqlens)
        penalty = _penalty(batch, algorithm)
        if penalty is not None:
            no_score = torch.zeros_like(per_sequence)
            rewards = token_rewards(no_score, penalty, kl_coef, batch.loss_mask, batch.cu_seqlens)
            advantages += return_to_go(rewards, batch.loss_mask, batch.cu_seqlens, gamma=algorithm.gamma)
        result.append(batch.with_fields(advantages=advantages))
    return result


def _present(tensor: torch.Tensor | None) -> list[float]:
    assert tensor is not None
    return tensor.tolist()
