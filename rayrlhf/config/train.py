"""`train`, `checkpoint`, `eval`: the optimisation and what surrounds it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import (
    Count,
    Fraction,
    NaturalNumber,
    NonNegativeNumber,
    NotBool,
    PositiveNumber,
    Problem,
    Section,
    Wanted,
)
from rayrlhf.config.rollout import SamplingConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists, no tuples.
Betas = Annotated[tuple[Beta, Beta], Field(strict=False), Wanted("a list of two numbers >= 0 and < 1")]


def _warmup_ends(train: TrainConfig) -> Problem | None:
    if train.warmup_steps <= train.num_steps:
        return None
    return Problem(
        "warmup_steps",
        got=f"{train.warmup_steps} with num_steps={train.num_steps}",
        wanted=f"at most train.num_steps, {train.num_steps}",
        fix="lower train.warmup_steps or raise train.num_steps",
    )


def _offload_has_a_partition(train: TrainConfig) -> Problem | None:
    if not train.offload_optimizer or train.zero_stage > 0:
        return None
    return Problem(
        "offload_optimizer",
        got="true with zero_stage=0",
        wanted="zero_stage 1, 2 or 3: DeepSpeed offloads a partitioned optimizer only",
        fix="set train.zero_stage to 2, or train.offload_optimizer to false",
    )


class TrainConfig(Section):
    num_workers: Count = 1
    """Training workers (data-parallel ranks)."""
    num_steps: Count
    """Steps of the run: one batch of rollouts each."""
    max_tokens_per_micro_batch: Count = 8192
    """Tokens of one packed forward and backward pass."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], NotBool] = 2
    """DeepSpeed's ZeRO stage: what workers share out (1 optimizer, 2 and gradients, 3 and weights)."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass."""
    lr: NonNegativeNumber = 1e-6
    """Learning rate of the actor."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: NaturalNumber = 0
    """Steps over which the learning rate rises linearly."""
    min_lr_ratio: Fraction = 0.0
    """Where a decaying learning rate ends, as a share of lr."""
    betas: Betas = (0.9, 0.95)
    """AdamW's betas."""
    eps: PositiveNumber = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeNumber = 0.0
    """AdamW's weight decay."""
    max_grad_norm: NonNegativeNumber = 1.0
    """Gradient norm is clipped to this; 0 switches it off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    logprob_chunk_tokens: Count = 256
    """Rows of logits that are alive at once."""
    num_threads: Count | None = None
    """Threads of a CPU worker; the node's cores divided by its workers when left out."""
    collective_timeout_seconds: Count = 600
    """Deadline of a collective between workers."""
    max_failures: NaturalNumber = 1
    """How often crashed workers are restarted from the newest checkpoint."""
    max_bad_steps: Count = 3
    """Stop after this many updates in a row with a gradient that is not finite."""

    checks = (_warmup_ends, _offload_has_a_partition)


def _several_responses_differ(evaluation: EvalConfig) -> Problem | None:
    if evaluation.samples_per_prompt == 1 or evaluation.sampling.temperature > 0:
        return None
    return Problem(
        "samples_per_prompt",
        got=f"{evaluation.samples_per_prompt} with sampling.temperature=0 (greedy)",
        wanted="1: greedy responses to one prompt are all the same",
        fix="set eval.sampling.temperature above 0, or remove eval.samples_per_prompt",
    )


class CheckpointConfig(Section):
    every_steps: Count | None = None
    """Save every n steps; null saves at the end only."""
    keep: Count = 2
    """How many checkpoints are kept."""
    export: bool = True
    """Write the actor as a Hugging Face folder at the end."""
    best: bool = True
    """Keep an export of the actor with the best evaluation so far in best/ (with eval.every_steps)."""


class EvalConfig(Section):
    every_steps: Count | None = None
    """Evaluate every n steps, beside before the first and after the last."""
    num_prompts: Count | None = None
    """Held-out prompts used; all when left out."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    """How evaluation responses are drawn; greedy unless told otherwise."""
    samples_per_prompt: Count = 1
    """Responses per held-out prompt; with 2 or more, pass@k for k = 1, 2, 4, … up to it."""
    pass_score: float = 1.0
    """Score from which a response counts as a pass."""
    show_samples: NaturalNumber = 5
    """Pairs of responses, before and after, in the summary."""

    checks = (_several_responses_differ,)
