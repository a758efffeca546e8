"""Rough estimate of the time of a step: a roofline with assumed utilisations. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayrlhf.capacity.budget import Budget
from rayrlhf.capacity.gpu_types import Gpu
from rayrlhf.capacity.model_shape import read_shape
from rayrlhf.config.policy import PolicyRunConfig

MODEL_FLOPS_UTILIZATION = 0.4  # of training
BANDWIDTH_UTILIZATION = 0.6  # of decoding, which reads all weights for every token
TENSOR_PARALLEL_EFFICIENCY = 0.85  # per doubling of an engine's GPUs: two all-reduces a layer
RECOMPUTE = 4 / 3  # forward passes of gradient checkpointing
OFFLOADED_STEP = 1.3  # an optimizer on the host


@dataclass(frozen=True)
class StepTime:
    """Seconds of the phases of a step."""

    rollout: float
    update: float

    @property
    def bottleneck(self) -> str:
        return "rollout" if self.rollout > self.update else "update"

    def step(self, *, overlap: bool) -> float:
        return max(self.rollout, self.update) if overlap else self.rollout + self.update


def step_time_of(config: PolicyRunConfig, budget: Budget, gpu: Gpu) -> StepTime:
    """Assumes responses of the maximal length, and prompts of half the maximal length."""
    shape, rollout, train = read_shape(config.model.path), config.rollout, config.train
    samples = rollout.prompts_per_step * rollout.group_size
    length = rollout.max_response_tokens
    per_engine = -(-samples // rollout.num_engines)
    capacity = (budget.tokens_in_flight or 1) // max(1, length + config.data.max_prompt_tokens // 2)
    at_once = max(1, min(rollout.max_concurrent_requests, capacity))
    rounds = -(-per_engine // at_once)
    gpus = rollout.tensor_parallel * TENSOR_PARALLEL_EFFICIENCY ** math.log2(rollout.tensor_parallel)
    read_seconds = shape.parameters * 2 / (gpus * gpu.bandwidth_tb * 1e12 * BANDWIDTH_UTILIZATION)
    flops = 2 * shape.active_parameters * min(at_once, per_engine)
    compute_seconds = flops / (gpus * gpu.tflops * 1e12 * MODEL_FLOPS_UTILIZATION)
    tokens = samples * (length + config.data.max_prompt_tokens // 2)
    # Forward and backward, 6 FLOPs per parameter and token, of the actor and a critic, if any; two forward
    # passes for old and reference log-probabilities.
    learners = 2 if config.needs_critic and not config.critic_is_separate else 1
    flops = tokens * shape.active_parameters * (6 * learners * config.algorithm.updates_per_batch + 2 * 2)
    flops *= RECOMPUTE if train.gradient_checkpointing else 1.0
    update = flops / (train.num_workers * gpu.tflops * 1e12 * MODEL_FLOPS_UTILIZATION)
    update *= OFFLOADED_STEP if train.offload_optimizer else 1.0
    return StepTime(rollout=rounds * length * max(read_seconds, compute_seconds), update=update)
