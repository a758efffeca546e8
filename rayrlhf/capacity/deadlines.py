"""Deadlines that follow from the length of responses, the requests in flight, and the size of models. Pure.

A deadline that was left out is raised to what a slow run needs; one that was given is refused if no engine
could meet it. Ranks wait for each other in a collective while one of them rolls out or waits for the engines'
start, so that deadline is the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from rayrlhf.capacity.budget import Budget, budget_of
from rayrlhf.capacity.gpu_types import Gpu
from rayrlhf.capacity.model_shape import ShapeUnknown
from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.policy import PolicyRunConfig

C = TypeVar("C")
# Seconds per token of one of many sequences: of a slow engine, and less than of any.
SLOW_ON_GPU, SLOW_ON_CPU, FASTEST = 0.03, 0.3, 0.002
LOAD_SECONDS_PER_GB = 10.0  # of an engine's weights from a shared file system, with what vLLM compiles
SLACK_SECONDS = 120.0  # that a collective outlasts what its ranks may wait for
RESPONSES, START, COLLECTIVE = "timeout_seconds", "start_timeout_seconds", "collective_timeout_seconds"


@dataclass(frozen=True)
class Rollout:
    """How one engine computes the responses of a step, for example 512 requests, 13 at once."""

    requests: int
    at_once: int
    tokens: int  # of the longest response

    @property
    def rounds(self) -> int:
        return math.ceil(self.requests / self.at_once)

    def seconds(self, per_token: float) -> float:
        return self.rounds * self.tokens * per_token

    def __str__(self) -> str:
        responses = f"{self.requests:,} responses of up to {self.tokens:,} tokens per engine"
        return f"{responses}, {self.at_once:,} at once"


def deadlines_left_out(config: Any) -> list[str]:
    """The keys that `with_deadlines` may set."""
    if not isinstance(config, PolicyRunConfig):
        return []
    keys = [f"rollout.{RESPONSES}", f"rollout.{START}"]
    left = [key for key in keys if key.partition(".")[2] not in config.rollout.model_fields_set]
    return left + [f"train.{COLLECTIVE}"] * (COLLECTIVE not in config.train.model_fields_set)


def with_deadlines(config: C, *, on_gpu: bool, gpu: Gpu | None = None) -> tuple[C, list[str]]:
    """The config with the deadlines that were left out, and a line for each that is not the default's.

    Raises:
        ConfigError: for a given deadline that cannot be met, or that ends another wait too early.
    """
    if not isinstance(config, PolicyRunConfig):
        return config, []
    budget = _budget(config, on_gpu=on_gpu, gpu=gpu)
    rollout = rollout_of(config, budget.tokens_in_flight if budget is not None else None)
    weights = 0 if budget is None else budget.roles["rollout"].device.get("weights", 0)
    # Of a tensor-parallel engine every slot loads its share, from the same files.
    loading = weights * config.rollout.tensor_parallel / 1e9 * LOAD_SECONDS_PER_GB
    slow = rollout.seconds(SLOW_ON_GPU if on_gpu else SLOW_ON_CPU)
    left = deadlines_left_out(config)
    lines: list[str] = []

    def left_out(key: str, default: float, wanted: float, why: str) -> float:
        if wanted <= default:
            return default
        minutes = math.ceil(wanted / 60)
        lines.append(f"{key}={60 * minutes}, as it is not set: {why}")
        return 60.0 * minutes

    responses, start = config.rollout.timeout_seconds, config.rollout.start_timeout_seconds
    if f"rollout.{RESPONSES}" in left:
        responses = left_out(f"rollout.{RESPONSES}", responses, slow, f"{rollout}")
    elif responses < rollout.seconds(FASTEST):
        raise ConfigError([_too_short(responses, rollout)])
    if f"rollout.{START}" in left:
        why = f"an engine loads {weights * config.rollout.tensor_parallel / 1e9:.0f} GB"
        start = left_out(f"rollout.{START}", start, loading, why)
    longest = max(responses, start) + SLACK_SECONDS
    collective = config.train.collective_timeout_seconds
    if f"train.{COLLECTIVE}" in left:
        why = "ranks wait for each other's rollouts and for engines that start"
        collective = int(left_out(f"train.{COLLECTIVE}", collective, longest, why))
    elif collective < (least := rollout.seconds(FASTEST) if f"rollout.{RESPONSES}" in left else responses):
        raise ConfigError([_collective(collective, least, rollout)])
    changed = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={RESPONSES: responses, START: start}),
            "train": config.train.model_copy(update={COLLECTIVE: collective}),
        }
    )
    return changed, lines


def rollout_of(config: PolicyRunConfig, tokens_in_flight: int | None) -> Rollout:
    """`tokens_in_flight`: that an engine's cache holds; None if that is not known."""
    rollout = config.rollout
    requests = math.ceil(rollout.prompts_per_step * rollout.oversampling) * rollout.group_size
    at_once = rollout.max_concurrent_requests
    if tokens_in_flight is not None:
        longest = config.data.max_prompt_tokens + rollout.max_response_tokens
        at_once = max(1, min(at_once, tokens_in_flight // longest))
    return Rollout(math.ceil(requests / rollout.num_engines), at_once, rollout.max_response_tokens)


def _budget(config: PolicyRunConfig, *, on_gpu: bool, gpu: Gpu | None) -> Budget | None:
    placement = config.placement.model_copy(update={"gpus_per_slot": int(on_gpu)})
    try:
        return budget_of(config.model_copy(update={"placement": placement}), gpu=gpu)
    except ShapeUnknown:
        return None


def _too_short(seconds: float, rollout: Rollout) -> Problem:
    least, speed = math.ceil(rollout.seconds(FASTEST)), f"{1 / FASTEST:g} per second"
    return Problem(
        f"rollout.{RESPONSES}",
        got=f"{seconds:g} with {rollout}",
        wanted=f"at least {least}: {rollout.rounds} x {rollout.tokens:,} tokens at {speed}",
        fix="remove the key, or configure more engines, fewer prompts per step or shorter responses",
    )


def _collective(seconds: float, least: float, rollout: Rollout) -> Problem:
    return Problem(
        f"train.{COLLECTIVE}",
        got=f"{seconds:g} with {rollout}",
        wanted=f"at least {math.ceil(least)}: ranks wait in a collective for each other's rollouts",
        fix="remove the key, or raise it",
    )
