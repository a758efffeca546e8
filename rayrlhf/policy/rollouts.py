"""Collects a step's groups of scored samples from the engines and the reward sources."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayrlhf.config.algorithm import AlgorithmConfig, DynamicSamplingConfig
from rayrlhf.config.rollout import SamplingConfig
from rayrlhf.policy.prompt_queue import Numbered, PromptQueue
from rayrlhf.reward.client import RewardClient
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.rollout.background import Background
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.samples import Sample
from rayrlhf.train.collectives import Ranks

OnGroup = Callable[[int], None]  # called with the number of finished groups


class Collector:
    """Requests groups of samples. A group is scored as soon as it is finished, while others are generated:
    by one request per reward source, as each costs its replica about a millisecond whatever its size.
    """

    def __init__(self, rollouts: RolloutClient, rewards: RewardClient) -> None:
        self.rollouts = rollouts
        self.rewards = rewards
        self.background = Background()

    async def group(
        self, numbered: Numbered, version: int, *, group_size: int, sampling: SamplingConfig
    ) -> list[Sample]:
        """The samples of one prompt, ordered by index, from weights of at least `version`."""
        group_id, prompt = numbered
        samples = [
            sample
            async for sample in self.rollouts.samples(
                prompt, group_id=group_id, group_size=group_size, min_version=version, sampling=sampling
            )
        ]
        return await self.rewards.score(sorted(samples, key=lambda sample: sample.sample_index))

    def collect(
        self,
        prompts: Sequence[Numbered],
        *,
        version: int,
        group_size: int,
        sampling: SamplingConfig,
        on_group: OnGroup = lambda done: None,
    ) -> list[Sample]:
        """The groups of all prompts, in the order of the prompts; waits for them."""

        async def all_groups() -> list[Sample]:
            groups = [
                asyncio.ensure_future(self.group(numbered, version, group_size=group_size, sampling=sampling))
                for numbered in prompts
            ]
            try:
                for done, group in enumerate(asyncio.as_completed(groups), start=1):
                    await group
                    on_group(done)
            finally:
                for group in groups:
                    group.cancel()
            return [sample for group in groups for sample in group.result()]

        return self.background.run(all_groups())


class GroupSource(Protocol):
    """Source of a step's groups: `RolloutsOnDemand` or `rollout_pool.RolloutPool`."""

    def next(self, step: int) -> list[Sample]:
        """This rank's whole groups of one prompt batch, `rollout.prompts_per_step` over all ranks."""
        ...

    def drain_restarted(self) -> int:
        """Number of groups restarted since the last call because they had become too old."""
        ...

    def close(self) -> None: ...


class RolloutsOnDemand:
    """Synchronous source: samples a prompt batch with the newest weights, and waits for all of it."""

    def __init__(
        self,
        prompts: PromptQueue,
        collector: Collector,
        *,
        group_size: int,
        sampling: SamplingConfig,
        on_group: OnGroup = lambda done: None,
    ) -> None:
        self.prompts = prompts
        self.collector = collector
        self.group_size = group_size
        self.sampling = sampling
        self.on_group = on_group

    def next(self, step: int) -> list[Sample]:
        prompts = self.prompts.take(self.prompts.per_rank)
        samples = self.collector.collect(
            prompts,
            version=step,
            group_size=self.group_size,
            sampling=self.sampling,
            on_group=self.on_group,
        )
        self.prompts.finish(group_id for group_id, _ in prompts)
        return samples

    def drain_restarted(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is in flight."""


@dataclass(frozen=True)
class Rewards:
    """The client scores samples and counts failed sources and answers not graded in time; the combiner
    computes one score from the rewards of several sources.
    """

    client: RewardClient
    combiner: RewardCombiner


@dataclass(frozen=True)
class StepGroups:
    """This rank's rollouts of a step."""

    samples: list[Sample]  # to train on: scored, in whole groups, informative ones with dynamic sampling
    sampled: list[Sample]  # all, dropped ones included
    num_groups: int  # of `samples`, over all ranks
    metrics: dict[str, float]


def collect_groups(
    source: GroupSource,
    rewards: Rewards,
    algorithm: AlgorithmConfig,
    ranks: Ranks,
    *,
    step: int,
    num_groups: int,
) -> StepGroups:
    """Collect one prompt batch, or with `algorithm.dynamic_sampling` as many as needed for `num_groups`
    informative groups over all ranks (DAPO, arXiv 2503.14476). Collective.

    Raises:
        RewardFailure: when too many samples of the step have no score.
    """
    dynamic = algorithm.dynamic_sampling
    kept: list[Sample] = []
    sampled: list[Sample] = []
    num_scored, num_batches = 0, 0
    while (
        num_batches < (dynamic.max_prompt_batches if dynamic else 1)
        and count_groups(kept, ranks) < num_groups
    ):
        samples = rewards.combiner.combine(source.next(step), ranks.sum_tensor)
        scored = scored_groups(samples, needs_group=algorithm.estimator.needs_group)
        kept += informative(scored, dynamic, rewards.combiner) if dynamic else scored
        sampled += samples
        num_scored += len(scored)
        num_batches += 1
    metrics = _count_failures(sampled, num_scored, rewards.client, ranks)
    if dynamic is not None:
        metrics["rollout/prompt_batches"] = float(num_batches)
        metrics["rollout/groups_in_range"] = float(count_groups(kept, ranks))
        kept = first_groups(kept, num_groups, ranks)
    return StepGroups(kept, sampled, count_groups(kept, ranks), metrics)


def _count_failures(
    sampled: Sequence[Sample], num_scored: int, client: RewardClient, ranks: Ranks
) -> dict[str, float]:
    totals = ranks.sum_numbers(
        {
            "unscored": float(sum(sample.score is None for sample in sampled)),
            "dropped": float(len(sampled) - num_scored),
            "unverified": float(client.drain_unverified()),
            "all": float(len(sampled)),
        }
    )
    client.check(int(totals["unscored"]), int(totals["all"]))
    return {"reward/failed": totals["dropped"], "reward/unverified": totals["unverified"]}


def scored_groups(samples: Sequence[Sample], *, needs_group: bool) -> list[Sample]:
    """Samples with a score; with `needs_group`, only those of groups with at least two of them."""
    scored = [sample for sample in samples if sample.score is not None]
    sizes = Counter(sample.group_id for sample in scored)
    return [sample for sample in scored if not needs_group or sizes[sample.group_id] > 1]


def informative(
    samples: Sequence[Sample], sampling: DynamicSamplingConfig, rewards: RewardCombiner
) -> list[Sample]:
    """Samples of groups whose raw rewards are not all equal, with a mean strictly between `low` and `high`,
    if given.

    Raw rewards, because length penalties would keep a group whose answers are all correct, and drop one for
    long wrong answers.
    """
    raw_reward = functools.partial(rewards.raw_reward, source=sampling.source)
    by_group: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        by_group[sample.group_id].append(raw_reward(sample))
    kept = {group_id for group_id, group in by_group.items() if _is_kept(group, sampling)}
    return [sample for sample in samples if sample.group_id in kept]


def _is_kept(rewards: Sequence[float], sampling: DynamicSamplingConfig) -> bool:
    mean = sum(rewards) / len(rewards)
    above = sampling.low is None or mean > sampling.low
    below = sampling.high is None or mean < sampling.high
    return min(rewards) < max(rewards) and above and below


def count_groups(samples: Sequence[Sample], ranks: Ranks) -> int:
    """Number of groups over all ranks; a group is on one rank. Collective."""
    mine = len({sample.group_id for sample in samples})
    return int(ranks.sum_numbers({"groups": float(mine)})["groups"])


def first_groups(samples: Sequence[Sample], count: int, ranks: Ranks) -> list[Sample]:
    """This rank's samples of the first `count` groups of all ranks, by group id. Collective."""
    group_ids = sorted(ranks.gather(sorted({sample.group_id for sample in samples})))
    chosen = set(group_ids[:count])
    return [sample for sample in samples if sample.group_id in chosen]
