"""Fills in settings that were left out and depend on device memory, by the memory plan. Pure.

These are `train.max_tokens_per_micro_batch`, `train.logprob_chunk_tokens`, and
`rollout.gpu_memory_utilization` where an engine shares GPUs with a trainer, whose weights stay in GPU memory
during rollout, but for `train.offload_weights_between`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rayrlhf.capacity.budget import Budget, budget_of
from rayrlhf.capacity.gpu_types import Gpu
from rayrlhf.capacity.model_shape import ShapeUnknown
from rayrlhf.config.policy import PolicyRunConfig

C = TypeVar("C", bound=Any)
TOKENS, SHARE, CHUNK = "max_tokens_per_micro_batch", "gpu_memory_utilization", "logprob_chunk_tokens"
# Larger ones are hardly faster: matrices of this many rows saturate any GPU.
SIZES = (16384, 8192, 4096, 2048, 1024, 512, 256)
SHARES = (0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25)
# Rows of the head at once on a GPU: its fp32 weight gradient [V, H] is read and written once per chunk.
GPU_CHUNK = 2048
MARGIN = 0.95  # of a GPU's usable memory that a plan may fill: it is accurate within a few percent
HOST_SHARE = 0.5  # of a machine's memory, for the slots of a run on CPUs


def keys_sized_by_plan(config: Any, *, on_gpu: bool) -> list[str]:
    """The keys that were left out and that the driver sets by the memory plan."""
    found = []
    if "train" in type(config).model_fields:
        if TOKENS not in config.train.model_fields_set:
            found.append(f"train.{TOKENS}")
        if on_gpu and CHUNK not in config.train.model_fields_set:
            found.append(f"train.{CHUNK}")
    shares = isinstance(config, PolicyRunConfig) and config.engines_share_with_trainers
    if on_gpu and shares and SHARE not in config.rollout.model_fields_set:
        found.append(f"rollout.{SHARE}")
    return found


def sized_for_gpu(config: C, gpu: Gpu) -> C:
    """The config with the first values that fit a GPU: large shares of engines, then large micro-batches.

    Unchanged if all keys are given, if nothing fits, or if a model's shape is unknown.
    """
    return _sized(config, lambda budget: max(budget.peak_bytes) <= gpu.usable_bytes * MARGIN, gpu)


def sized_for_host(config: C, memory_bytes: int) -> C:
    """The same for slots on the CPUs of one machine, where the cache of engines has a fixed size."""
    return _sized(config, lambda budget: sum(budget.peak_bytes) <= memory_bytes * HOST_SHARE, None)


def _sized(config: C, fits: Callable[[Budget], bool], gpu: Gpu | None) -> C:
    if not keys_sized_by_plan(config, on_gpu=gpu is not None):
        return config
    try:
        for candidate in _candidates(config, gpu):
            if fits(budget_of(candidate, gpu=gpu)):
                return candidate
    except ShapeUnknown:
        pass  # the driver reports it with the plan
    return config


def _candidates(config: C, gpu: Gpu | None) -> Iterator[C]:
    left, longest = keys_sized_by_plan(config, on_gpu=gpu is not None), longest_sample(config)
    sizes: list[int | None] = [None]
    if f"train.{TOKENS}" in left:
        sizes = [*(size for size in SIZES if size > longest), longest]
    shares: tuple[float | None, ...] = SHARES if f"rollout.{SHARE}" in left else (None,)
    for share in shares:
        for size in sizes:
            changes: dict[str, Any] = {}
            of_train: dict[str, int] = {} if size is None else {TOKENS: size}
            if f"train.{CHUNK}" in left:
                of_train[CHUNK] = GPU_CHUNK
            if of_train:
                changes["train"] = config.train.model_copy(update=of_train)
            if share is not None:
                changes["rollout"] = config.rollout.model_copy(update={SHARE: share})
            yield config.model_copy(update=changes)


def longest_sample(config: Any) -> int:
    """Tokens of the longest sample, which must fit in one micro-batch."""
    if isinstance(config, PolicyRunConfig):
        sample = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        return max(sample, config.data.ptx.max_tokens if config.data.ptx is not None else 0)
    return config.data.max_tokens * config.data.sequences_per_example
