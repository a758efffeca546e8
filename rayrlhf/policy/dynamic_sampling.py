"""Which groups of a draw are worth training on (DAPO, arXiv 2503.14476), decided over all ranks alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from rayrlhf.config.algorithm import DynamicSamplingConfig
from rayrlhf.samples import Sample
from rayrlhf.train import collectives


def scored_groups(samples: Sequence[Sample], *, needs_group: bool) -> list[Sample]:
    """Samples with a score; group estimators also lose those whose whole group has failed around them."""
    scored = [sample for sample in samples if sample.score is not None]
    sizes = Counter(sample.group_id for sample in scored)
    return [sample for sample in scored if not needs_group or sizes[sample.group_id] > 1]


def informative(
    samples: Sequence[Sample], sampling: DynamicSamplingConfig, raw_reward: Callable[[Sample], float]
) -> list[Sample]:
    """Samples of groups whose raw rewards are not all equal, with a mean strictly between `low` and `high`
    where these are given.

    Raw, because penalties on length would keep a group whose answers are all right, and drop one for long
    wrong answers.
    """
    rewards: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        rewards[sample.group_id].append(raw_reward(sample))
    kept = {group_id for group_id, group in rewards.items() if _is_kept(group, sampling)}
    return [sample for sample in samples if sample.group_id in kept]


def _is_kept(rewards: Sequence[float], sampling: DynamicSamplingConfig) -> bool:
    mean = sum(rewards) / len(rewards)
    above = sampling.low is None or mean > sampling.low
    below = sampling.high is None or mean < sampling.high
    return min(rewards) < max(rewards) and above and below


def count_groups(samples: Sequence[Sample]) -> int:
    """Groups over all ranks; a group lies on one rank. Collective."""
    mine = len({sample.group_id for sample in samples})
    return int(collectives.sum_metrics({"groups": float(mine)})["groups"])


def first_groups(samples: Sequence[Sample], count: int) -> list[Sample]:
    """This rank's samples of the first `count` groups of all ranks, by group id. Collective."""
    everywhere = sorted(collectives.gather_lists(sorted({sample.group_id for sample in samples})))
    chosen = set(everywhere[:count])
    return [sample for sample in samples if sample.group_id in chosen]
