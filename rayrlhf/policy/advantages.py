"""Advantages of a step: against the group while it is whole, then per token and whitened over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
from rayrlhf.samples import Sample
from rayrlhf.train import collectives


def with_group_advantages(samples: Sequence[Sample], advantage: str) -> list[Sample]:
    """Scored samples of whole groups, each with its advantage against its group where the estimator compares
    them. Raises `ValueError` for a group that cannot be compared (`group_advantages`).
    """
    if not ADVANTAGES[advantage].needs_group or not samples:
        return list(samples)
    scores = torch.tensor([sample.score for sample in samples])
    groups = torch.tensor([sample.group_id for sample in samples])
    estimates = group_advantages(advantage, scores, groups).tolist()
    return [replace(s, group_advantage=a) for s, a in zip(samples, estimates, strict=True)]


def add_advantages(
    batches: Sequence[PackedBatch], algorithm: AlgorithmConfig, *, kl_coef: float
) -> list[PackedBatch]:
    """Advantages of every token and (with a critic) returns; whitened over all ranks where the estimator
    wants it, so `batches` are all of this rank's micro-batches of the step. Collective.
    """
    compares = ADVANTAGES[algorithm.advantage].needs_group
    estimate = _against_group if compares else _per_token
    estimated = [estimate(batch, algorithm, kl_coef) for batch in batches]
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


def _against_group(batch: PackedBatch, algorithm: AlgorithmConfig, kl_coef: float) -> PackedBatch:
    """The sequence's advantage on all its tokens; a KL in the reward comes off per token, as return-to-go."""
    assert batch.group_advantages is not None
    mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
    advantages = spread(batch.group_advantages, mask, cu_seqlens)
    penalty = _penalty(batch, algorithm)
    if penalty is not None:
        no_score = torch.zeros_like(batch.group_advantages)
        rewards = token_rewards(no_score, penalty, kl_coef, mask, cu_seqlens)
        advantages += return_to_go(rewards, mask, cu_seqlens, gamma=algorithm.gamma)
    return batch.with_fields(advantages=advantages)
