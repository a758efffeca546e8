"""Turns a step's samples into packed mini-batches with advantages: group advantages, balancing, packing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import (
    group_advantages,
    masked_moments,
    return_to_go,
    spread,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.kl import token_kl
from rayrlhf.algorithms.registry import ESTIMATORS
from rayrlhf.batch import PolicyBatch, pack_samples, padding_samples
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.data.packing import balanced_partition, micro_batches, split_even
from rayrlhf.policy.losses import TextObjective, loss_counts, policy_forward
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.learner import Term

MiniBatch = list[PolicyBatch]  # micro-batches of one optimizer step on this rank; equally many on every rank
Key = tuple[int, int]  # (group id, sample index): identifies a sample in the step, on all ranks


# Group advantages, while a group is on one rank


def with_group_advantages(samples: Sequence[Sample], advantage: str) -> list[Sample]:
    """Add group advantages to the scored samples of whole groups, if the estimator uses them.

    Raises:
        ValueError: for a group that cannot be compared (`group_advantages`).
    """
    if not ESTIMATORS[advantage].needs_group or not samples:
        return list(samples)
    scores = torch.tensor([sample.score for sample in samples])
    groups = torch.tensor([sample.group_id for sample in samples])
    estimates = group_advantages(advantage, scores, groups).tolist()
    return [replace(s, group_advantage=a) for s, a in zip(samples, estimates, strict=True)]


# Balance and pack


@dataclass(frozen=True)
class Packing:
    """Sizes of mini-batches and micro-batches of a step."""

    num_mini_batches: int
    full_batch: int  # samples that make up `num_mini_batches`
    budget_tokens: int  # of a micro-batch
    seed: int


def balance_and_pack(
    samples: Sequence[Sample], packing: Packing, ranks: Ranks, *, step: int
) -> tuple[list[MiniBatch], dict[str, float]]:
    """Shuffle the samples of all ranks into mini-batches, balance each over the ranks, and pack it.

    Fewer samples than `packing.full_batch` make fewer mini-batches, none of them larger, so that the few
    samples left by a filter do not get as many optimizer steps as a full batch. The samples of a mini-batch
    depend only on the step's samples, not on the number of ranks. Every rank gets equally many micro-batches
    (ZeRO-3 would deadlock otherwise): ranks with fewer add padding batches. Collective.

    Returns:
        This rank's mini-batches, and metrics.
    """
    parts, metrics = _balance(samples, packing, ranks, step)
    packed = [pack_evenly(part, ranks, packing.budget_tokens) for part in parts]
    num_padding = sum(num_padding for _, num_padding in packed)
    mini_batches = [batches for batches, _ in packed]
    total = sum(map(len, mini_batches)) * ranks.world_size
    padding = ranks.sum_numbers({"padding": float(num_padding)})["padding"]
    room = max(1.0, (total - padding) * packing.budget_tokens)
    return mini_batches, metrics | {
        "data/mini_batches": float(len(mini_batches)),
        "data/micro_batches": total / ranks.world_size,
        "data/padding_fraction": padding / total,
        "data/fill": metrics["data/tokens"] / room,
    }


def pack_evenly(samples: Sequence[Sample], ranks: Ranks, budget_tokens: int) -> tuple[MiniBatch, int]:
    """Pack this rank's samples into micro-batches on its device, equally many and at least one on every rank.
    Collective.

    Returns:
        The micro-batches, and how many of them are padding.
    """
    packs = micro_batches([sample.num_tokens for sample in samples], budget_tokens)
    batches = [pack_samples([samples[i] for i in pack]) for pack in packs]
    num_padding = max(1, int(ranks.max(len(batches)))) - len(batches)
    batches += [padding_samples()] * num_padding
    return [batch.to(ranks.device) for batch in batches], num_padding


def _balance(
    samples: Sequence[Sample], packing: Packing, ranks: Ranks, step: int
) -> tuple[list[list[Sample]], dict[str, float]]:
    """This rank's samples of each mini-batch after balancing, and metrics of the balancing."""
    mine = [(_key(sample), sample.num_tokens) for sample in samples]
    by_rank = ranks.gather([mine])
    tokens = dict(sorted(pair for pairs in by_rank for pair in pairs))
    keys = list(tokens)
    wanted = math.ceil(len(keys) * packing.num_mini_batches / packing.full_batch)
    num_parts = min(packing.num_mini_batches, max(1, wanted))
    order = np.random.default_rng([packing.seed, step]).permutation(len(keys))
    destination: dict[Key, tuple[int, int]] = {}  # rank, mini-batch
    tokens_of_rank = [0] * ranks.world_size
    for number, chosen in enumerate(split_even([keys[i] for i in order], num_parts)):
        shares = balanced_partition([tokens[key] for key in chosen], ranks.world_size)
        for rank, share in enumerate(shares):
            destination |= {chosen[i]: (rank, number) for i in share}
            tokens_of_rank[rank] += sum(tokens[chosen[i]] for i in share)
    outgoing: list[list[Sample]] = [[] for _ in range(ranks.world_size)]
    for sample in samples:
        outgoing[destination[_key(sample)][0]].append(_without_text(sample))
    parts: list[list[Sample]] = [[] for _ in range(num_parts)]
    for sample in sorted(ranks.exchange(outgoing), key=_key):
        parts[destination[_key(sample)][1]].append(sample)
    collected = [sum(size for _, size in pairs) for pairs in by_rank]
    return parts, {
        "data/tokens": float(sum(collected)),
        "data/samples": float(len(keys)),
        "data/imbalance": _imbalance(tokens_of_rank),
        "data/imbalance_before": _imbalance(collected),
    }


def _key(sample: Sample) -> Key:
    return sample.group_id, sample.sample_index


def _without_text(sample: Sample) -> Sample:
    """The sample without its text, which training does not need and which would be sent for nothing."""
    prompt = replace(sample.prompt, prompt="", columns={})
    return replace(sample, prompt=prompt, response="", policy_versions=[])


def _imbalance(tokens_of_rank: Sequence[int]) -> float:
    """Excess of the busiest rank over the mean, as a fraction: the others wait that long."""
    mean = sum(tokens_of_rank) / len(tokens_of_rank)
    return max(tokens_of_rank) / mean - 1.0 if mean else 0.0


def map_over_step(
    mini_batches: Sequence[MiniBatch], change: Callable[[MiniBatch], list[PolicyBatch]]
) -> list[MiniBatch]:
    """Apply `change` to all micro-batches of the step at once and cut the result into mini-batches again."""
    changed = iter(change([batch for batches in mini_batches for batch in batches]))
    return [[next(changed) for _ in batches] for batches in mini_batches]


# Per token


def with_token_advantages(
    mini_batches: Sequence[MiniBatch], algorithm: AlgorithmConfig, ranks: Ranks, *, kl_coef: float
) -> list[MiniBatch]:
    """Add token advantages and, with a critic, returns to the step's mini-batches. Collective.

    They come from group advantages, or from rewards and values; minus the KL penalty with `kl_in: reward`;
    whitened over all ranks if the estimator does so.
    """
    return map_over_step(mini_batches, lambda batches: add_advantages(batches, algorithm, ranks, kl_coef))


def add_advantages(
    batches: Sequence[PolicyBatch], algorithm: AlgorithmConfig, ranks: Ranks, kl_coef: float
) -> list[PolicyBatch]:
    """`with_token_advantages` for all of this rank's micro-batches of the step. Collective."""
    estimator = algorithm.estimator
    estimate = _from_group if estimator.needs_group else _per_token
    estimated = [estimate(batch, algorithm, kl_coef) for batch in batches]
    if not (estimator.whitened and algorithm.whiten_advantages):
        return estimated
    local = torch.stack([masked_moments(_advantages(b), b.loss_mask) for b in estimated]).sum(0)
    moments = ranks.sum_tensor(local)
    return [replace(b, advantages=whiten(_advantages(b), b.loss_mask, moments)) for b in estimated]


def _advantages(batch: PolicyBatch) -> Tensor:
    assert batch.advantages is not None
    return batch.advantages


def _penalty(batch: PolicyBatch, algorithm: AlgorithmConfig) -> Tensor | None:
    """KL per token [T] if it is part of the reward; None if it is off or in the loss."""
    if batch.ref_logprobs is None or algorithm.kl_in != "reward":
        return None
    assert batch.old_logprobs is not None
    return token_kl(algorithm.kl_estimator, batch.old_logprobs, batch.ref_logprobs, batch.loss_mask)


def _per_token(batch: PolicyBatch, algorithm: AlgorithmConfig, kl_coef: float) -> PolicyBatch:
    mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
    rewards = token_rewards(batch.scores, _penalty(batch, algorithm), kl_coef, mask, cu_seqlens)
    advantages, returns = algorithm.estimator.function(
        rewards, batch.values, mask, cu_seqlens, gamma=algorithm.gamma, lam=algorithm.lam
    )
    return replace(batch, advantages=advantages, returns=returns)


def _from_group(batch: PolicyBatch, algorithm: AlgorithmConfig, kl_coef: float) -> PolicyBatch:
    """The sequence's advantage on all its tokens; a KL in the reward is subtracted per token, as
    return-to-go.
    """
    mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
    advantages = spread(batch.group_advantages, mask, cu_seqlens)
    penalty = _penalty(batch, algorithm)
    if penalty is not None:
        no_score = torch.zeros_like(batch.group_advantages)
        rewards = token_rewards(no_score, penalty, kl_coef, mask, cu_seqlens)
        advantages += return_to_go(rewards, mask, cu_seqlens, gamma=algorithm.gamma)
    return replace(batch, advantages=advantages)


# Texts that are trained on in addition to the responses (PPO-ptx, arXiv 2203.02155)


class TextStream:
    """This rank's texts of each step as packed micro-batches, equally many on every rank."""

    def __init__(
        self,
        stream: Iterator[tuple[int, list[Prompt]]],
        ranks: Ranks,
        *,
        coef: float,
        budget_tokens: int,
    ) -> None:
        self.stream = stream
        self.ranks = ranks
        self.coef = coef
        self.budget_tokens = budget_tokens

    def next(self) -> Term:
        """The next step's texts, as a term of every objective of that step. Collective."""
        _, texts = next(self.stream)
        batches, _ = pack_evenly([_whole_text(text) for text in texts], self.ranks, self.budget_tokens)
        num_tokens = loss_counts(batches, self.ranks).tokens
        return Term(batches, policy_forward(temperature=1.0), TextObjective(self.coef, num_tokens))


def _whole_text(text: Prompt) -> Sample:
    """A sample whose tokens are all loss tokens except the first, which has no context."""
    first, *rest = text.prompt_ids
    return Sample(
        group_id=text.row_id,
        sample_index=0,
        prompt=Prompt(text.row_id, [first], ""),
        response_ids=rest,
        response="",
        rollout_logprobs=[0.0] * len(rest),
        loss_mask=[1] * len(rest),
        policy_versions=[],
        truncated=False,
        score=0.0,
    )
