"""Which groups of a draw are worth training on (DAPO, arXiv 2503.14476), decided over all ranks alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from rayrlhf.config.algorithm import DynamicSamplingConfig
from rayrlhf.samples import Sample
from rayrlhf.train import collectives


def scored_groups(samples: Sequence[Sample], *, needs_group: bool) -> list[Sample]:
    """Samples with a score; group estimators also lose those whose whole group has failed around them."""
    scored = [sample for sample in samples if sample.score is not None]
    sizes = Counter(sample.group_id for sample in scored)
    return [sample for sample in scored if not needs_group or sizes[sample.group_id] > 1]


def in_range(samples: Sequence[Sample], sampling: DynamicSamplingConfig) -> list[Sample]:
    """Samples of groups whose mean score lies strictly between `low` and `high`."""
    scores: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        assert sample.score is not None
        scores[sample.group_id].append(sample.score)
    means = {group_id: sum(group) / len(group) for group_id, group in scores.items()}
    return [sample for sample in samples if sampling.low < means[sample.group_id] < sampling.high]


def count_groups(samples: Sequence[Sample]) -> int:
    """Groups over all ranks; a group lies on one rank. Collective."""
    mine = len({sample.group_id for sample in samples})
    return int(collectives.sum_metrics({"groups": float(mine)})["groups"])


def first_groups(samples: Sequence[Sample], count: int) -> list[Sample]:
    """This rank's samples of the first `count` groups of all ranks, by group id. Collective."""
    everywhere = sorted(collectives.gather_lists(sorted({sample.group_id for sample in samples})))
    chosen = set(everywhere[:count])
    return [sample for sample in samples if sample.group_id in chosen]
