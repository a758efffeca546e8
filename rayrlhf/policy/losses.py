"""Losses of one optimizer step: a micro-batch's share of the policy, value and language-model objective.

Each loss is an object that holds the step's constants (counts, coefficients), so that it can be sent to the
process with the model: `share, metrics = loss(output, batch)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import aggregate, loss_sequences, masked
from rayrlhf.algorithms.kl import token_kl
from rayrlhf.algorithms.metrics import Mean, Metrics, token_mean
from rayrlhf.algorithms.rollout_correction import rollout_weights
from rayrlhf.algorithms.value_loss import explained_variance, value_loss
from rayrlhf.batch import PackedBatch, PolicyBatch, ValueBatch
from rayrlhf.config.algorithm import AlgorithmConfig, RolloutCorrectionConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.learner import Forward


@dataclass(frozen=True)
class LossCounts:
    """Counts over all ranks and micro-batches of one optimizer step."""

    tokens: float  # loss tokens
    sequences: float  # sequences with a loss token

    def of_mean(self, aggregation: str) -> float:
        """The number of items that an objective with this aggregation is a mean over."""
        return self.tokens if aggregation == "token_mean" else self.sequences


def loss_counts(batches: Sequence[PackedBatch], ranks: Ranks) -> LossCounts:
    """Counts over the micro-batches of all ranks. Collective."""
    local = [
        torch.stack([b.loss_mask.sum().double(), loss_sequences(b.loss_mask, b.cu_seqlens).double()])
        for b in batches
    ]
    tokens, sequences = ranks.sum_tensor(torch.stack(local).sum(0)).tolist()
    return LossCounts(tokens, sequences)


def policy_forward(temperature: float) -> Forward:
    def forward(module: Any, batch: PackedBatch) -> TokenLogprobs:
        tokens = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
        routes = batch.routed_experts if isinstance(batch, PolicyBatch) else None
        return module(
            *tokens, temperature, routed_experts=routes, images=batch.images, prefixes=batch.prefixes
        )

    return forward


def value_forward(module: Any, batch: PackedBatch) -> Tensor:
    tokens = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
    return module(*tokens, images=batch.images, prefixes=batch.prefixes)


@dataclass(frozen=True)
class PolicyObjective:
    """Policy loss, weighted by the rollout correction, + KL (with `kl_in: loss`) - entropy bonus."""

    algorithm: AlgorithmConfig
    counts: LossCounts
    kl_coef: float
    constant_length: float  # the longest response, which `sequence_sum_norm` divides by

    def __call__(self, output: TokenLogprobs, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        algorithm, mask, cu_seqlens = self.algorithm, batch.loss_mask, batch.cu_seqlens
        # With a single update per batch, the policy before the update is that of this forward pass.
        old_logprobs = output.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        assert batch.advantages is not None
        per_token, metrics = algorithm.loss.function(
            output.logprobs,
            old_logprobs,
            batch.advantages,
            mask,
            cu_seqlens,
            **algorithm.loss.keywords(algorithm),
        )
        correction = algorithm.rollout_correction or RolloutCorrectionConfig()
        weights, correction_metrics = rollout_weights(
            old_logprobs,
            batch.rollout_logprobs,
            mask,
            cu_seqlens,
            mode=correction.mode if algorithm.rollout_correction is not None else None,
            level=correction.level,
            low=correction.low,
            high=correction.high,
        )
        per_token = weights * per_token
        metrics = metrics + correction_metrics
        metrics["loss/entropy"] = token_mean(output.entropy, mask)
        if algorithm.entropy_coef:
            per_token = per_token - algorithm.entropy_coef * masked(output.entropy, mask)
        if batch.ref_logprobs is not None:
            kl = token_kl(algorithm.kl_estimator, output.logprobs, batch.ref_logprobs, mask)
            metrics["kl/mean"] = token_mean(kl, mask)
            if algorithm.kl_in == "loss":
                per_token = per_token + self.kl_coef * kl
        return _share(per_token, batch, algorithm, self.counts, self.constant_length), metrics


@dataclass(frozen=True)
class ValueObjective:
    """The critic's clipped squared error, with the aggregation of the policy loss."""

    algorithm: AlgorithmConfig
    counts: LossCounts
    clip: float | None
    constant_length: float

    def __call__(self, values: Tensor, batch: ValueBatch) -> tuple[Tensor, Metrics]:
        per_token, metrics = value_loss(values, batch.values, batch.returns, batch.loss_mask, clip=self.clip)
        explained = explained_variance(batch.values, batch.returns, batch.loss_mask)
        metrics["loss/explained_variance"] = explained
        return _share(per_token, batch, self.algorithm, self.counts, self.constant_length), metrics


@dataclass(frozen=True)
class TextObjective:
    """coef · mean negative log-probability over `num_tokens` loss tokens of texts (PPO-ptx, arXiv
    2203.02155).
    """

    coef: float
    num_tokens: float

    def __call__(self, output: TokenLogprobs, batch: PackedBatch) -> tuple[Tensor, Metrics]:
        total = -masked(output.logprobs, batch.loss_mask).sum()
        metrics = Metrics({"loss/ptx": Mean(total.detach(), batch.loss_mask.sum())})
        return self.coef * total / max(self.num_tokens, 1.0), metrics


def _share(
    per_token: Tensor,
    batch: PackedBatch,
    algorithm: AlgorithmConfig,
    counts: LossCounts,
    constant_length: float,
) -> Tensor:
    return aggregate(
        algorithm.aggregation,
        per_token,
        batch.loss_mask,
        batch.cu_seqlens,
        global_tokens=counts.tokens,
        global_sequences=counts.sequences,
        constant_length=constant_length,
    )
