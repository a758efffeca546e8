"""Samples to the ranks that train on them: equal token work, whoever has collected them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayrlhf.batch import PackedBatch, empty_like_batch, pack_samples
from rayrlhf.data.balance import balanced_partition
from rayrlhf.data.packing import micro_batches, split_even
from rayrlhf.samples import Sample
from rayrlhf.train import collectives

MiniBatch = list[PackedBatch]  # micro-batches of one optimizer step on this rank; equally many on every rank
Key = tuple[int, int]  # (group id, sample index): a sample's place in the step, on any rank


@dataclass(frozen=True)
class Shared:
    """What a rank trains on in one step."""

    mini_batches: list[MiniBatch]
    metrics: dict[str, float]


def share_out(
    samples: Sequence[Sample],
    *,
    num_mini_batches: int,
    full_batch: int,
    budget_tokens: int,
    seed: int,
    step: int,
) -> Shared:
    """Shuffle the samples of all ranks into mini-batches, balance each over the ranks, and pack it.

    `full_batch` samples make up `num_mini_batches`; fewer samples make up fewer mini-batches, none of them
    larger: a few that a filter has left do not take as many optimizer steps as a full batch. Which samples
    make up a mini-batch depends on the samples alone, not on how many ranks there are. Every rank gets
    equally many micro-batches (ZeRO-3 would otherwise wait for ever): ranks with fewer add micro-batches that
    weigh nothing. Collective.
    """
    parts, metrics = _balance(samples, num_mini_batches, full_batch, seed, step)
    mini_batches: list[MiniBatch] = []
    fillers = 0
    for part in parts:
        packs = micro_batches([sample.num_tokens for sample in part], budget_tokens)
        batches = [pack_samples([part[i] for i in pack]) for pack in packs]
        wanted = max(1, int(collectives.max_over_ranks(len(batches))))
        fillers += wanted - len(batches)
        batches += [empty_like_batch(token_id=0)] * (wanted - len(batches))
        mini_batches.append([batch.to(collectives.device()) for batch in batches])
    total = sum(map(len, mini_batches)) * collectives.world_size()
    weightless = collectives.sum_metrics({"fillers": float(fillers)})["fillers"]
    room = max(1.0, (total - weightless) * budget_tokens)
    return Shared(
        mini_batches,
        metrics
        | {
            "data/mini_batches": float(len(mini_batches)),
            "data/micro_batches": total / collectives.world_size(),
            "data/filler_fraction": weightless / total,
            "data/fill": metrics["data/tokens"] / room,
        },
    )


def _balance(
    samples: Sequence[Sample], num_mini_batches: int, full_batch: int, seed: int, step: int
) -> tuple[list[list[Sample]], dict[str, float]]:
    """This rank's samples of each mini-batch, and what the balancing has achieved."""
    mine = [(_key(sample), sample.num_tokens) for sample in samples]
    by_rank = collectives.gather_lists([mine])
    tokens = dict(sorted(pair for pairs in by_rank for pair in pairs))
    keys = list(tokens)
    num_parts = min(num_mini_batches, max(1, math.ceil(len(keys) * num_mini_batches / full_batch)))
    order = np.random.default_rng([seed, step]).permutation(len(keys))
    destination: dict[Key, tuple[int, int]] = {}  # rank, mini-batch
    tokens_of_rank = [0] * collectives.world_size()
    for number, chosen in enumerate(split_even([keys[i] for i in order], num_parts)):
        shares = balanced_partition([tokens[key] for key in chosen], collectives.world_size())
        for rank, share in enumerate(shares):
            destination |= {chosen[i]: (rank, number) for i in share}
            tokens_of_rank[rank] += sum(tokens[chosen[i]] for i in share)
    outgoing: list[list[Sample]] = [[] for _ in range(collectives.world_size())]
    for sample in samples:
        outgoing[destination[_key(sample)][0]].append(_without_text(sample))
    parts: list[list[Sample]] = [[] for _ in range(num_parts)]
    for sample in sorted(collectives.exchange(outgoing), key=_key):
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
    """Training needs the tokens only; the rest would travel for nothing."""
    prompt = replace(sample.prompt, prompt="", columns={})
    return replace(sample, prompt=prompt, response="", policy_versions=[])


def _imbalance(tokens_of_rank: Sequence[int]) -> float:
    """How much more than the mean the busiest rank has; the others wait that long."""
    mean = sum(tokens_of_rank) / len(tokens_of_rank)
    return max(tokens_of_rank) / mean - 1.0 if mean else 0.0
