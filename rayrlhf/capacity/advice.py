"""Suggests settings that make a job fit, and placements on given GPUs.

Pure: every candidate is checked with the memory plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rayrlhf.capacity.attention_heads import splits_evenly
from rayrlhf.capacity.budget import Budget
from rayrlhf.capacity.gpu_types import Gpu
from rayrlhf.capacity.model_shape import read_shape
from rayrlhf.capacity.throughput import step_time_of
from rayrlhf.config.base import ConfigError
from rayrlhf.config.policy import PolicyRunConfig

NUM_FIXES = 3
MAX_CHANGES = 3  # of settings in one candidate

# `load(overrides)` gives the job's config with these, `judge(config)` its budget. Both raise `ConfigError`.
Load = Callable[[Sequence[str]], Any]
Judge = Callable[[Any], Budget]


@dataclass(frozen=True)
class Change:
    overrides: tuple[str, ...]
    slowdown: float  # of a step: an estimate
    why: str


@dataclass(frozen=True)
class Fix:
    overrides: tuple[str, ...]
    slowdown: float
    budget: Budget


@dataclass(frozen=True)
class Suggestion:
    overrides: tuple[str, ...]
    budget: Budget
    seconds: float  # of a step: an estimate


def changes_of(config: Any) -> list[Change]:
    """Single settings that lower a job's memory, each with its estimated slowdown."""
    changes: list[Change] = []
    train = getattr(config, "train", None)
    if train is not None:
        if not train.gradient_checkpointing:
            why = "activations are recomputed in the backward pass"
            changes.append(Change(("train.gradient_checkpointing=true",), 1.33, why))
        for stage in range(train.zero_stage + 1, 4):
            slowdown = {1: 1.0, 2: 1.02, 3: 1.15}[stage]
            changes.append(Change((f"train.zero_stage={stage}",), slowdown, "workers partition more"))
        if not train.offload_optimizer:
            changes.append(
                Change(("train.offload_optimizer=true",), 1.3, "the optimizer is kept in host memory")
            )
        if not train.offload_params:
            changes.append(Change(("train.offload_params=true",), 1.6, "weights are fetched layer by layer"))
        for ranks in (2, 4, 8):
            overrides = (f"model.sequence_parallel={ranks}", *_without_flash_attention(config.model))
            why = "workers split the tokens of each micro-batch"
            changes.append(Change(overrides, 1.1 + 0.05 * math.log2(ranks), why))
        half = train.max_tokens_per_micro_batch // 2
        changes.append(
            Change((f"train.max_tokens_per_micro_batch={half}",), 1.05, "smaller micro-batches, more of them")
        )
    rollout = getattr(config, "rollout", None)
    if rollout is not None and hasattr(rollout, "gpu_memory_utilization"):
        lower = round(rollout.gpu_memory_utilization / 2, 2)
        changes.append(
            Change(
                (f"rollout.gpu_memory_utilization={lower}",), 1.1, "a smaller cache, fewer requests at once"
            )
        )
    return changes


def _without_flash_attention(model: Any) -> tuple[str, ...]:
    """Sequence parallelism needs another attention kernel."""
    return ("model.attention=auto",) if model.attention == "flash_attention_2" else ()


def fixes(config: Any, load: Load, judge: Judge) -> list[Fix]:
    """The changes that make it fit with the least slowdown; none that contains another one."""
    found: list[Fix] = []
    changes = changes_of(config)
    candidates = [combo for size in range(1, MAX_CHANGES + 1) for combo in combinations(changes, size)]
    for combo in sorted(candidates, key=_slowdown):
        overrides = tuple(override for change in combo for override in change.overrides)
        if any(set(fix.overrides) <= set(overrides) for fix in found):
            continue
        budget = _budget_with(overrides, load, judge)
        if budget is not None and budget.fits:
            found.append(Fix(overrides, _slowdown(combo), budget))
            if len(found) == NUM_FIXES:
                break
    return found


def _slowdown(combo: Sequence[Change]) -> float:
    product = 1.0
    for change in combo:
        product *= change.slowdown
    return product


def _budget_with(overrides: Sequence[str], load: Load, judge: Judge) -> Budget | None:
    try:
        return judge(load(overrides))
    except ConfigError:
        return None  # the settings contradict each other


def suggest(config: PolicyRunConfig, num_gpus: int, gpu: Gpu, load: Load, judge: Judge) -> Suggestion | None:
    """The placement on `num_gpus` with the shortest estimated step; None if none fits."""
    best: Suggestion | None = None
    for overrides in _placements(config, num_gpus):
        try:
            candidate = load(overrides)
            budget = judge(candidate)
        except ConfigError:
            continue
        if not budget.fits or budget.spec.num_slots > num_gpus or budget.tokens_in_flight == 0:
            continue
        overlap = candidate.rollout.max_staleness is not None
        seconds = step_time_of(candidate, budget, gpu).step(overlap=overlap)
        if best is None or seconds < best.seconds:
            best = Suggestion(overrides, budget, seconds)
    return best


def _placements(config: PolicyRunConfig, num_gpus: int) -> Iterator[tuple[str, ...]]:
    """Everything colocated on all GPUs, or trainers and engines on separate GPUs in several proportions."""
    others = sum(source.num_replicas for source in config.reward.sources if source.type == "model")
    for width in _widths(config):
        for stage, offload, checkpointing in _memory_ladder():
            common = (
                f"train.zero_stage={stage}",
                f"train.offload_optimizer={offload}",
                f"train.gradient_checkpointing={checkpointing}",
                f"rollout.tensor_parallel={width}",
                "placement.gpus_per_slot=1",
            )
            for utilization in (0.85, 0.6, 0.4):
                if num_gpus % width == 0:
                    yield (
                        *common,
                        "placement.preset=colocate_all",
                        f"train.num_workers={num_gpus}",
                        f"rollout.num_engines={num_gpus // width}",
                        f"rollout.gpu_memory_utilization={utilization}",
                    )
            for trainers in (num_gpus * part // 8 for part in (2, 4, 6)):
                left = num_gpus - trainers - others
                if trainers > 0 and left >= width:
                    yield (
                        *common,
                        "placement.preset=colocate_actor_ref",
                        *(("critic.location=worker",) if config.needs_critic else ()),
                        f"train.num_workers={trainers}",
                        f"rollout.num_engines={left // width}",
                        "rollout.gpu_memory_utilization=0.85",
                    )


def _widths(config: PolicyRunConfig) -> list[int]:
    """Tensor-parallel sizes that divide both kinds of heads, so that keys and values are held once."""
    shape = read_shape(config.model.path)
    return [width for width in (1, 2, 4, 8) if splits_evenly(shape, width)]


def _memory_ladder() -> Iterator[tuple[int, str, str]]:
    """(ZeRO stage, offload, checkpointing), the fastest first."""
    for stage in (2, 3):
        for offload in ("false", "true"):
            for checkpointing in ("false", "true"):
                yield stage, offload, checkpointing
