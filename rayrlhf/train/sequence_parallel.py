"""Sequence parallelism: a group of ranks computes each micro-batch jointly, every rank a part of its tokens.

Every rank has its own micro-batches, as without sequence parallelism. A group processes those of its ranks
one after the other: all its ranks compute the same stream and the same loss, and only the micro-batch's owner
counts it.
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


def set_sequence_group(module: nn.Module, model: TrainedModelConfig, train: OptimizerConfig) -> None:
    """Let groups of `model.sequence_parallel` consecutive ranks compute the inputs of `module` jointly."""
    if model.sequence_parallel > 1:
        assert isinstance(module, PackedModel), "the configuration refuses other models"
        module.sequence_group = _neighbours(model.sequence_parallel, train.collective_timeout_seconds)


def sequence_ranks(module: Any) -> int:
    """Number of ranks that compute each micro-batch of `module` jointly."""
    group = getattr(module, "sequence_group", None)
    return 1 if group is None else group.size()


def together(module: Any, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
    """Iterate over the micro-batches of all ranks of the group, each with whether it is one of this rank's
    `batches`.

    Collective over the ranks that share `module`'s sequences; every rank must pass equally many `batches`.
    """
    group = getattr(module, "sequence_group", None)
    if group is None:
        yield from ((batch, True) for batch in batches)
        return
    own = dist.get_rank(group)
    for batch in batches:
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, batch.to("cpu"), group=group)
        for owner, shared in enumerate(gathered):
            yield (batch, True) if owner == own else (shared.to(collectives.device()), False)


def own_outputs(
    module: Any, batches: Iterable[PackedBatch], forward: Callable[[PackedBatch], Any]
) -> list[Any]:
    """Outputs of `forward`, which calls `module`, for this rank's own micro-batches. Collective."""
    outputs: list[Any] = []
    for batch, is_own in together(module, batches):
        output = forward(batch)
        if is_own:
            outputs.append(output)
    return outputs


@functools.cache
def _neighbours(size: int, timeout_seconds: float) -> dist.ProcessGroup:
    """This rank's group of `size` consecutive ranks."""
    if collectives.world_size() % size:
        raise ValueError(
            f"model.sequence_parallel={size} does not divide the number of workers, "
            f"{collectives.world_size()}: choose a divisor"
        )
    timeout = datetime.timedelta(seconds=timeout_seconds)
    group, _ = dist.new_subgroups(size, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group
