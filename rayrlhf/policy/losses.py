"""The losses of one optimizer step, closed over what is constant in it: counts, coefficients, temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import aggregate, learnt_sequences, masked
from rayrlhf.algorithms.kl import token_kl
from rayrlhf.algorithms.policy_losses import POLICY_LOSSES
from rayrlhf.algorithms.rollout_correction import rollout_weights
from rayrlhf.algorithms.value_loss import value_loss
from rayrlhf.batch import PackedBatch
from rayrlhf.config.algorithm import AlgorithmConfig, RolloutCorrectionConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.train import collectives
from rayrlhf.train.learner import Loss


@dataclass(frozen=True)
class StepCounts:
    """Over all ranks and micro-batches of one optimizer step."""

    tokens: float  # learnt tokens
    sequences: float  # sequences with a learnt token

    @staticmethod
    def of(batches: list[PackedBatch]) -> StepCounts:
        """Collective."""
        local = [
            torch.stack([b.loss_mask.sum().double(), learnt_sequences(b.loss_mask, b.cu_seqlens).double()])
            for b in batches
        ]
        tokens, sequences = collectives.sum_over_ranks(torch.stack(local).sum(0)).tolist()
        return StepCounts(tokens, sequences)


def policy_forward(temperature: float) -> Any:
    def forward(module: Any, batch: PackedBatch) -> TokenLogprobs:
        return module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, temperature)

    return forward


def value_forward(module: Any, batch: PackedBatch) -> Tensor:
    return module(batch.input_ids, batch.position_ids, batch.cu_seqlens)


def policy_objective(
    algorithm: AlgorithmConfig, counts: StepCounts, *, kl_coef: float, constant_length: float
) -> Loss:
    """Policy loss, weighted by the rollout correction, + KL (where it is in the loss) - entropy bonus.

    Metric sums are over learnt tokens.
    """
    policy_loss = POLICY_LOSSES[algorithm.policy_loss]
    correction = algorithm.rollout_correction or RolloutCorrectionConfig()

    def objective(output: TokenLogprobs, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch.loss_mask
        # With a single update per batch the policy before it is the policy of this very forward pass.
        old_logprobs = batch.old_logprobs if batch.old_logprobs is not None else output.logprobs.detach()
        assert batch.advantages is not None
        per_token, metrics = policy_loss(
            output.logprobs,
            old_logprobs,
            batch.advantages,
            mask,
            batch.cu_seqlens,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        if batch.rollout_logprobs is not None:
            weights, told = rollout_weights(
                old_logprobs,
                batch.rollout_logprobs,
                mask,
                batch.cu_seqlens,
                mode=correction.mode if algorithm.rollout_correction is not None else None,
                level=correction.level,
                low=correction.low,
                high=correction.high,
            )
            per_token = weights * per_token
            metrics |= told
        metrics["loss/entropy"] = masked(output.entropy.detach(), mask).sum()
        if algorithm.entropy_coef:
            per_token = per_token - algorithm.entropy_coef * masked(output.entropy, mask)
        if batch.ref_logprobs is not None:
            kl = token_kl(algorithm.kl_estimator, output.logprobs, batch.ref_logprobs, mask)
            metrics["kl/mean"] = kl.detach().sum()
            if algorithm.kl_in == "loss":
                per_token = per_token + kl_coef * kl
        share = aggregate(
            algorithm.aggregation,
            per_token,
            mask,
            batch.cu_seqlens,
            global_tokens=counts.tokens,
            global_sequences=counts.sequences,
            constant_length=constant_length,
        )
        return share, metrics

    return objective


def language_model_objective(coef: float, num_tokens: float) -> Loss:
    """coef · mean negative log-probability over `num_tokens` learnt tokens of the step (PPO-ptx, arXiv
    2203.02155).
    """

    def objective(output: TokenLogprobs, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mean = -masked(output.logprobs, batch.loss_mask).sum() / max(num_tokens, 1.0)
        return coef * mean, {"loss/ptx": mean.detach()}

    return objective


def value_objective(
    algorithm: AlgorithmConfig, counts: StepCounts, *, clip: float | None, constant_length: float
) -> Loss:
    def objective(values: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.values is not None and batch.returns is not None
        per_token, metrics = value_loss(values, batch.values, batch.returns, batch.loss_mask, clip=clip)
        share = aggregate(
            algorithm.aggregation,
            per_token,
            batch.loss_mask,
            batch.cu_seqlens,
            global_tokens=counts.tokens,
            global_sequences=counts.sequences,
            constant_length=constant_length,
        )
        return share, metrics

    return objective
