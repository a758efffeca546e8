"""Turns a step's samples into packed mini-batches with advantages: group advantages, balancing, packing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

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
from rayrlhf.data.packing import (
    balanced_partition,
    micro_batches,
    micro_batches_of_groups,
    rows_of_group,
    split_even,
)
from rayrlhf.policy.losses import TextObjective, loss_counts, policy_forward
from rayrlhf.prefixes import MIN_SHARED_TOKENS
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.learner import Term

EVEN_ENOUGH = 1.01  # load of a rank, relative to the mean, up to which its groups stay whole
MOST_BALANCINGS = 16
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
    share_prefixes: bool = False  # compute the prompt of a group's samples once per micro-batch


def balance_and_pack(
    samples: Sequence[Sample], packing: Packing, ranks: Ranks, *, step: int
) -> tuple[list[MiniBatch], dict[str, float]]:
    """Shuffle the groups of all ranks into mini-batches, balance each over the ranks, and pack it.

    Mini-batches have equally many samples: a group whose samples do not all fit in one goes on in the next.
    Fewer samples than `packing.full_batch` make fewer mini-batches, none of them larger, so that the few
    samples left by a filter do not get as many optimizer steps as a full batch. The samples of a mini-batch
    depend only on the step's samples, not on the number of ranks. Every rank gets equally many micro-batches
    (ZeRO-3 would deadlock otherwise): ranks with fewer add padding batches. Collective.

    Returns:
        This rank's mini-batches, and metrics.
    """
    parts, metrics = _balance(samples, packing, ranks, step)
    packed = [
        pack_evenly(part, ranks, packing.budget_tokens, share_prefixes=packing.share_prefixes)
        for part in parts
    ]
    mini_batches = [batches for batches, _ in packed]
    total = sum(map(len, mini_batches)) * ranks.world_size
    rows = sum(batch.num_rows for batches in mini_batches for batch in batches if not batch.is_padding)
    sums = ranks.sum_numbers({"padding": float(sum(count for _, count in packed)), "rows": float(rows)})
    padding = sums["padding"]
    room = max(1.0, (total - padding) * packing.budget_tokens)
    return mini_batches, metrics | {
        "data/mini_batches": float(len(mini_batches)),
        "data/micro_batches": total / ranks.world_size,
        "data/padding_fraction": padding / total,
        "data/fill": sums["rows"] / room,
        "data/prefix_share": 1.0 - sums["rows"] / max(1.0, metrics["data/tokens"]),
    }


def pack_evenly(
    samples: Sequence[Sample], ranks: Ranks, budget_tokens: int, *, share_prefixes: bool = False
) -> tuple[MiniBatch, int]:
    """Pack this rank's samples, in the order of their groups, into micro-batches on its device, equally many
    and at least one on every rank. With `share_prefixes`, the samples of a group are in one micro-batch, if
    they fit. Collective.

    Returns:
        The micro-batches, and how many of them are padding.
    """
    lengths = [sample.num_tokens for sample in samples]
    if share_prefixes:
        groups = [[i for i, _ in group] for _, group in groupby(enumerate(samples), _group_of_numbered)]
        shared = [_shared_tokens([samples[i] for i in group]) for group in groups]
        packs = micro_batches_of_groups(lengths, groups, shared, budget_tokens)
    else:
        packs = micro_batches(lengths, budget_tokens)
    batches = [pack_samples([samples[i] for i in pack], share_prefixes=share_prefixes) for pack in packs]
    num_padding = max(1, int(ranks.max(len(batches)))) - len(batches)
    batches += [padding_samples()] * num_padding
    return [batch.to(ranks.device) for batch in batches], num_padding


def _group_of_numbered(numbered: tuple[int, Sample]) -> int:
    return numbered[1].group_id


def _shared_tokens(group: Sequence[Sample]) -> int:
    """Tokens of the prompt that models compute once for all samples of the group; 0 if they are too few."""
    shared = SampleSize.of(group[0]).shared_with(SampleSize.of(sample) for sample in group)
    for sample in group[1:]:  # replayed routes, which may differ, make a difference too
        ours, others = group[0].routed_experts, sample.routed_experts
        if ours is None and others is None:
            continue
        if ours is None or others is None:
            return 0
        differ = (ours[:shared] != others[:shared]).any((1, 2)).nonzero()[0]
        shared = int(differ[0]) if len(differ) else shared
    return shared if shared >= MIN_SHARED_TOKENS else 0


class SampleSize(NamedTuple):
    """Tokens of a sample, known to all ranks."""

    num_tokens: int
    prompt_tokens: int

    @staticmethod
    def of(sample: Sample) -> SampleSize:
        return SampleSize(sample.num_tokens, len(sample.prompt.prompt_ids))

    def shared_with(self, group: Iterable[SampleSize]) -> int:
        """Tokens of the prompt that are a prefix of every sample of the group and none of them whole."""
        return min(self.prompt_tokens, *(size.num_tokens - 1 for size in group))


def _balance(
    samples: Sequence[Sample], packing: Packing, ranks: Ranks, step: int
) -> tuple[list[list[Sample]], dict[str, float]]:
    """This rank's samples of each mini-batch after balancing, and metrics of the balancing."""
    by_rank = ranks.gather([size_table(samples)])
    table = np.concatenate(by_rank)
    sizes = {
        (group, index): SampleSize(num_tokens, prompt_tokens)
        for group, index, num_tokens, prompt_tokens in table[np.lexsort((table[:, 1], table[:, 0]))].tolist()
    }

    def rows(keys: Sequence[Key]) -> int:
        """Rows that models compute for samples of one group in one micro-batch."""
        if len(keys) == 1:
            return sizes[keys[0]].num_tokens
        group = [sizes[key] for key in keys]
        shared = group[0].shared_with(group) if packing.share_prefixes else 0
        shared = shared if shared >= MIN_SHARED_TOKENS else 0
        return rows_of_group([size.num_tokens for size in group], shared)

    groups = _by_group(sizes)
    wanted = math.ceil(len(sizes) * packing.num_mini_batches / packing.full_batch)
    num_parts = min(packing.num_mini_batches, max(1, wanted))
    order = np.random.default_rng([packing.seed, step]).permutation(len(groups))
    shuffled = [key for i in order for key in groups[i]]
    destination: dict[Key, tuple[int, int]] = {}  # rank, mini-batch
    rows_of_rank = [0] * ranks.world_size
    for number, chosen in enumerate(split_even(shuffled, num_parts)):
        together = _by_group(chosen) if packing.share_prefixes else [[key] for key in chosen]
        for rank, parts in enumerate(_over_ranks(together, ranks.world_size, rows)):
            place = rank, number
            for part, num_rows in parts:
                destination |= dict.fromkeys(part, place)
                rows_of_rank[rank] += num_rows
    outgoing: list[list[Sample]] = [[] for _ in range(ranks.world_size)]
    for sample in samples:
        outgoing[destination[_key(sample)][0]].append(_without_text(sample))
    parts_of_step: list[list[Sample]] = [[] for _ in range(num_parts)]
    for sample in sorted(ranks.exchange(outgoing), key=_key):
        parts_of_step[destination[_key(sample)][1]].append(sample)
    if packing.share_prefixes:
        keys_by_rank = [sorted(map(tuple, of_rank[:, :2].tolist())) for of_rank in by_rank]
        collected = [sum(map(rows, _by_group(keys))) for keys in keys_by_rank]
    else:
        collected = [int(of_rank[:, 2].sum()) for of_rank in by_rank]
    return parts_of_step, {
        "data/tokens": float(table[:, 2].sum()),
        "data/samples": float(len(sizes)),
        "data/imbalance": _imbalance(rows_of_rank),
        "data/imbalance_before": _imbalance(collected),
    }


def size_table(samples: Sequence[Sample]) -> np.ndarray:
    """Key and size of each sample, [S, 4]. An array: of a step of 64k samples, Python objects are unpickled
    for a quarter of a second on every rank.
    """
    rows = [(*_key(sample), *SampleSize.of(sample)) for sample in samples]
    return np.array(rows, dtype=np.int64).reshape(len(rows), 4)


def _by_group(keys: Iterable[Key]) -> list[list[Key]]:
    """Runs of keys of the same group."""
    return [list(group) for _, group in groupby(keys, lambda key: key[0])]


Part = tuple[list[Key], int]  # samples of a group that one rank computes, and their rows


def _over_ranks(
    groups: Sequence[list[Key]], num_ranks: int, rows: Callable[[Sequence[Key]], int]
) -> list[list[Part]]:
    """Each rank's parts of the groups.

    Whole groups are balanced over the ranks; then each rank with more rows than the mean halves its largest
    part, all are balanced again, and so on. Every part computes the prefix of its group again, so of all
    these divisions that one is taken whose busiest rank has the fewest rows.
    """
    parts: list[Part] = [(group, rows(group)) for group in groups]
    best: list[list[Part]] = []
    fewest = math.inf
    for _ in range(MOST_BALANCINGS):
        shares = balanced_partition([size for _, size in parts], num_ranks)
        loads = [sum(parts[i][1] for i in share) for share in shares]
        if max(loads) < fewest:
            fewest, best = max(loads), [[parts[i] for i in share] for share in shares]
        limit = EVEN_ENOUGH * sum(loads) / num_ranks
        largest = {
            max(share, key=lambda i: (len(parts[i][0]) > 1, parts[i][1]))
            for share, load in zip(shares, loads, strict=True)
            if load > limit
        }
        if all(len(parts[i][0]) == 1 for i in largest):
            break
        parts = [
            part
            for i, whole in enumerate(parts)
            for part in (_halves(whole[0], rows) if i in largest else (whole,))
        ]
    return best


def _halves(keys: list[Key], rows: Callable[[Sequence[Key]], int]) -> list[Part]:
    return [(half, rows(half)) for half in split_even(keys, 2) if half]


def _key(sample: Sample) -> Key:
    return sample.group_id, sample.sample_index


def _without_text(sample: Sample) -> Sample:
    """The sample without its text, which training does not need and which would be sent for nothing."""
    prompt = replace(sample.prompt, prompt="", columns={})
    return replace(sample, prompt=prompt, response="", policy_versions=[])


def _imbalance(rows_of_rank: Sequence[int]) -> float:
    """Excess of the busiest rank over the mean, as a fraction: the others wait that long."""
    mean = sum(rows_of_rank) / len(rows_of_rank)
    return max(rows_of_rank) / mean - 1.0 if mean else 0.0


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
