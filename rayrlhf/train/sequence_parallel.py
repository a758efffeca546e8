"""Micro-batches whose tokens a group of ranks computes together (sequence parallelism).

Every rank has micro-batches of its own, as without it. A group goes through those of its ranks one after the
other: all compute the same stream, a part of its tokens each, and the same loss; its owner counts it.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import TrainedModelConfig
from rayrlhf.config.train import OptimizerConfig
from rayrlhf.models.parallel import PackedModel
from rayrlhf.train import collectives


def share_sequences(module: nn.Module, model: TrainedModelConfig, train: OptimizerConfig) -> None:
    """From here on, `model.sequence_parallel` neighbouring ranks compute what `module` is given."""
    if model.sequence_parallel > 1:
        assert isinstance(module, PackedModel), "the configuration refuses other models"
        module.sequence_group = _neighbours(model.sequence_parallel, train.collective_timeout_seconds)


def together(module: Any, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
    """The micro-batches that this rank takes part in, and whether each is one of its own, `batches`.

    Collective over the ranks that share `module`'s sequences: equally many `batches` on each.
    """
    group = getattr(module, "sequence_group", None)
    if group is None:
        yield from ((batch, True) for batch in batches)
        return
    own = dist.get_rank(group)
    for batch in batches:
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, batch.to("cpu"), group=group)
        for owner, shared in enumerate(everyone):
            yield (batch, True) if owner == own else (shared.to(collectives.device()), False)


def own_outputs(
    module: Any, batches: Iterable[PackedBatch], forward: Callable[[PackedBatch], Any]
) -> list[Any]:
    """What `forward`, which calls `module`, says of this rank's own micro-batches. Collective."""
    outputs: list[Any] = []
    for batch, is_own in together(module, batches):
        output = forward(batch)
        if is_own:
            outputs.append(output)
    return outputs


@functools.cache
def _neighbours(size: int, timeout_seconds: float) -> dist.ProcessGroup:
    """This rank's group of `size` ranks that follow one another."""
    if collectives.world_size() % size:
        raise ValueError(
            f"model.sequence_parallel={size} does not divide the number of workers, "
            f"{collectives.world_size()}: choose a divisor"
        )
    timeout = datetime.timedelta(seconds=timeout_seconds)
    group, _ = dist.new_subgroups(size, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group
