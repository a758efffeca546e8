"""`train`, `checkpoint`, `eval`: optimizer, batches, checkpoints and evaluation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from rayrlhf.config.base import (
    ConfigError,
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
from rayrlhf.config.rollout import EvalSamplingConfig

WARMUP_RATIO = 0.03  # of supervised jobs
SAMPLES_PER_STEP = 64
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


def _offload_has_a_partition(train: OptimizerConfig) -> Problem | None:
    if not train.offload_optimizer or train.zero_stage > 0:
        return None
    return Problem(
        "offload_optimizer",
        got="true with zero_stage=0",
        wanted="zero_stage 1, 2 or 3: DeepSpeed offloads a partitioned optimizer only",
        fix="set train.zero_stage to 2, or train.offload_optimizer to false",
    )


def _offloaded_weights_are_partitioned(train: OptimizerConfig) -> Problem | None:
    if not train.offload_params or train.zero_stage == 3:
        return None
    return Problem(
        "offload_params",
        got=f"true with zero_stage={train.zero_stage}",
        wanted="zero_stage 3: with lower stages every GPU computes on full weights",
        fix="set train.zero_stage to 3, or train.offload_params to false",
    )


def _secondary_partition_divides(train: OptimizerConfig) -> Problem | None:
    size = train.hpz_partition_size
    if size == 1 or (train.zero_stage == 3 and train.num_workers % size == 0):
        return None
    if train.zero_stage != 3:
        return Problem(
            "hpz_partition_size",
            got=f"{size} with zero_stage={train.zero_stage}",
            wanted="1: only ZeRO-3 partitions weights",
            fix="set train.zero_stage to 3, or remove train.hpz_partition_size",
        )
    return Problem(
        "hpz_partition_size",
        got=f"{size} with num_workers={train.num_workers}",
        wanted="a divisor of train.num_workers, best the workers of a node",
        fix="set train.hpz_partition_size to such a number",
    )


def _secondary_partition_is_on_gpus(train: OptimizerConfig) -> Problem | None:
    if train.hpz_partition_size == 1 or not train.offload_params:
        return None
    return Problem(
        "hpz_partition_size",
        got=f"{train.hpz_partition_size} with offload_params=true",
        wanted="1: a second copy on the GPUs undoes the offloading",
        fix="remove train.hpz_partition_size or train.offload_params",
    )


def _overlap_has_a_reduction(train: OptimizerConfig) -> Problem | None:
    if not train.overlap_comm or train.zero_stage >= 2:
        return None
    return Problem(
        "overlap_comm",
        got=f"true with zero_stage={train.zero_stage}",
        wanted="zero_stage 2 or 3: whole gradients are reduced once, after the last micro-batch",
        fix="set train.zero_stage to 2, or train.overlap_comm to false",
    )


def _bf16_masters_are_partitioned_on_the_device(train: OptimizerConfig) -> Problem | None:
    if train.master_weights == "float32" or (train.zero_stage > 0 and not train.offload_optimizer):
        return None
    unfit = "zero_stage=0" if train.zero_stage == 0 else "offload_optimizer=true"
    return Problem(
        "master_weights",
        got=f"bfloat16 with {unfit}",
        wanted="zero_stage 1, 2 or 3 with the optimizer on the GPU: DeepSpeed has bf16 masters only there",
        fix="set train.zero_stage to 2 and train.offload_optimizer to false, or remove train.master_weights",
    )


def _gradients_add_up_in_partitions(train: OptimizerConfig) -> Problem | None:
    on_device = not train.offload_optimizer or train.zero_stage == 3
    wide_masters = train.master_weights == "float32"
    if train.grad_accum_dtype == "weights" or (train.zero_stage >= 2 and on_device and wide_masters):
        return None
    unfit = {
        f"zero_stage={train.zero_stage}": train.zero_stage < 2,
        "offload_optimizer=true": not on_device,
        "master_weights=bfloat16": not wide_masters,
    }
    return Problem(
        "grad_accum_dtype",
        got="float32 with " + " and ".join(setting for setting, is_set in unfit.items() if is_set),
        wanted="zero_stage 3, or 2 with the optimizer on the GPU, and fp32 master weights: "
        "elsewhere DeepSpeed accumulates gradients in the dtype of the weights",
        fix="set train.zero_stage to 3 and train.master_weights to float32, or remove train.grad_accum_dtype",
    )


def _offloaded_activations_are_checkpointed(train: OptimizerConfig) -> Problem | None:
    if not train.activation_offload or train.gradient_checkpointing:
        return None
    return Problem(
        "activation_offload",
        got="true with gradient_checkpointing=false",
        wanted="gradient_checkpointing: true: the inputs of checkpointed layers are offloaded",
        fix="set train.gradient_checkpointing to true, or remove train.activation_offload",
    )


OPTIMIZER_CHECKS = (
    _offloaded_activations_are_checkpointed,
    _gradients_add_up_in_partitions,
    _bf16_masters_are_partitioned_on_the_device,
    _offload_has_a_partition,
    _offloaded_weights_are_partitioned,
    _secondary_partition_divides,
    _secondary_partition_is_on_gpus,
    _overlap_has_a_reduction,
)


class OptimizerConfig(Section):
    """Fields of every trainer."""

    num_workers: Count = 1
    """Training workers (data-parallel ranks)."""
    max_tokens_per_micro_batch: Count = 8192
    """Tokens of one packed forward and backward pass; left out, the most that fit by the memory plan."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], NotBool] = 2
    """DeepSpeed's ZeRO stage: what is partitioned (1 optimizer, 2 and gradients, 3 and weights)."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory."""
    offload_params: bool = False
    """Keep the weights in host memory too, fetched layer by layer (ZeRO-3)."""
    hpz_partition_size: Count = 1
    """Ranks that together hold a full copy of ZeRO-3's weights, such as a node's (arXiv 2306.10209)."""
    master_weights: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's weights and moments; bfloat16 takes half the memory and loses updates < weight/256."""
    grad_accum_dtype: Literal["weights", "float32"] = "weights"
    """Dtype in which gradients are accumulated: the weights' or float32; bfloat16 loses addends < sum/256."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass."""
    lr: NonNegativeNumber = 1e-6
    """Learning rate; of the actor, where there is a critic too. Ten times the default with model.lora."""
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
    share_prefixes: bool = True
    """Compute tokens that sequences of a micro-batch begin with once: a group's prompt, a pair's."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    activation_offload: bool = False
    """Keep what checkpointing stores, each layer's input, in host memory until the backward pass."""
    logprob_chunk_tokens: Count = 256
    """Rows of logits in memory at once; left out, 2,048 on GPUs."""
    num_threads: Count | None = None
    """Threads of a CPU worker; the node's cores divided by its workers when left out."""
    collective_timeout_seconds: Count = 900
    """Deadline of a collective between workers."""
    max_failures: NaturalNumber = 1
    """How often crashed workers are restarted from the newest checkpoint."""
    max_bad_steps: Count = 3
    """Stop after this many consecutive updates with a gradient that is not finite."""

    checks = OPTIMIZER_CHECKS

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, on which the learning rate's schedule depends."""
        raise NotImplementedError


def _weights_between_are_whole(train: TrainConfig) -> Problem | None:
    if not train.offload_weights_between or train.zero_stage < 3:
        return None
    return Problem(
        "offload_weights_between",
        got="true with zero_stage=3",
        wanted="false: each worker has a part of the weights, which offload_params keeps in host memory",
        fix="remove train.offload_weights_between, or set train.zero_stage to 2",
    )


class TrainConfig(OptimizerConfig):
    num_steps: Count
    """Steps of the run: one batch of rollouts each."""
    offload_weights_between: bool = False
    """During rollouts of sleeping engines, keep actor, critic and reference in host memory (ZeRO 0 to 2)."""

    checks = (_warmup_ends, _weights_between_are_whole, *OPTIMIZER_CHECKS)

    @property
    def total_steps(self) -> int:
        return self.num_steps


def _steps_or_epochs(train: SupervisedTrainConfig) -> Problem | None:
    if train.num_steps is None or train.num_epochs is None:
        return None
    return Problem(
        "num_epochs",
        got=f"{train.num_epochs:g} with num_steps={train.num_steps}",
        wanted="one of the two: both set the length of the run",
        fix="remove train.num_epochs or train.num_steps",
    )


def _one_warmup(train: SupervisedTrainConfig) -> Problem | None:
    if not (train.warmup_steps and train.warmup_ratio):
        return None
    return Problem(
        "warmup_ratio",
        got=f"{train.warmup_ratio:g} with warmup_steps={train.warmup_steps}",
        wanted="one of the two",
        fix="remove train.warmup_ratio or train.warmup_steps",
    )


def _steps_by_samples_or_tokens(train: SupervisedTrainConfig) -> Problem | None:
    if train.samples_per_step is None or train.tokens_per_step is None:
        return None
    return Problem(
        "tokens_per_step",
        got=f"{train.tokens_per_step} with samples_per_step={train.samples_per_step}",
        wanted="one of the two: both set the size of a step",
        fix="remove train.samples_per_step or train.tokens_per_step",
    )


def _workers_share_micro_batches(train: SupervisedTrainConfig) -> Problem | None:
    tokens, size, workers = train.tokens_per_step, train.max_tokens_per_micro_batch, train.num_workers
    if tokens is None or not train.micro_batch_is_given or tokens % (size * workers) == 0:
        return None
    nearest = max(1, round(tokens / (size * workers))) * size * workers
    return Problem(
        "tokens_per_step",
        got=f"{tokens} with max_tokens_per_micro_batch={size} and num_workers={workers}",
        wanted=f"a multiple of {size} x {workers} = {size * workers}: every worker has equally many",
        fix=f"set train.tokens_per_step to {nearest}, or change train.max_tokens_per_micro_batch",
    )


def _micro_batches_to_fill_are_given(train: SupervisedTrainConfig) -> Problem | None:
    if train.micro_batch_is_given or (train.tokens_per_step is None and not train.fill_micro_batches):
        return None
    by = "fill_micro_batches=true"
    if train.tokens_per_step is not None:
        by = f"tokens_per_step={train.tokens_per_step}"
    return Problem(
        "max_tokens_per_micro_batch",
        got=f"nothing, with {by}",
        wanted="an integer >= 1: which rows make a step depends on it, also when the run is resumed",
        fix="set train.max_tokens_per_micro_batch, for example to 8192",
    )


def _workers_share_samples(train: SupervisedTrainConfig) -> Problem | None:
    if train.samples_per_step is None or train.samples_per_step >= train.num_workers:
        return None
    return Problem(
        "samples_per_step",
        got=f"{train.samples_per_step} with num_workers={train.num_workers}",
        wanted="at least one sample per worker",
        fix=f"set train.samples_per_step to {train.num_workers} or more",
    )


class SupervisedTrainConfig(OptimizerConfig):
    tokens_per_step: Count | None = None
    """Tokens of one step, over all workers: as many samples as fill its micro-batches; null: by samples."""
    samples_per_step: Count | None = None
    """Samples (or pairs) of one optimizer step, over all workers; null: 64, or by tokens_per_step."""
    fill_micro_batches: bool = False
    """Exchange samples between near steps so that micro-batches are full; tokens_per_step always does."""
    num_epochs: PositiveNumber | None = None
    """Passes over the training data, 1 when neither this nor num_steps is given."""
    num_steps: Count | None = None
    """Optimizer steps, instead of num_epochs."""
    warmup_ratio: Fraction | None = None
    """Share of the steps over which the learning rate rises linearly; null: 0.03, or 0 with warmup_steps."""

    checks = (
        *OPTIMIZER_CHECKS,
        _steps_or_epochs,
        _one_warmup,
        _steps_by_samples_or_tokens,
        _workers_share_samples,
        _workers_share_micro_batches,
        _micro_batches_to_fill_are_given,
    )

    @field_validator("samples_per_step")
    @classmethod
    def _samples_unless_tokens(cls, samples: int | None, info: ValidationInfo) -> int | None:
        """Fill in the default, so that the resolved config shows it."""
        if samples is None and info.data.get("tokens_per_step") is None:
            return SAMPLES_PER_STEP
        return samples

    @field_validator("warmup_ratio")
    @classmethod
    def _one_of_two(cls, ratio: float | None, info: ValidationInfo) -> float:
        """Fill in the default, so that the resolved config shows it."""
        if ratio is not None:
            return ratio
        return 0.0 if info.data.get("warmup_steps") else WARMUP_RATIO

    @property
    def total_steps(self) -> int:
        assert self.num_steps is not None, "num_steps is filled in once the data have been counted"
        return self.num_steps

    @property
    def rows_per_step(self) -> int:
        """Samples of a step that is given by their number."""
        assert self.samples_per_step is not None, "steps are given by tokens"
        return self.samples_per_step

    @property
    def micro_batch_is_given(self) -> bool:
        return "max_tokens_per_micro_batch" in self.model_fields_set

    @property
    def order_depends_on(self) -> tuple[str, ...]:
        """Other keys on which it depends which samples make a step."""
        if self.tokens_per_step is not None:
            return ("max_tokens_per_micro_batch",)
        return ("max_tokens_per_micro_batch", "num_workers") if self.fill_micro_batches else ()

    def with_steps(self, num_rows: int, num_steps: int | None = None) -> SupervisedTrainConfig:
        """Epochs and warm-up ratio as steps, for `num_rows` training samples, which make `num_steps` of them
        where steps are given by tokens. Raises `ConfigError`.
        """
        if num_steps is None:
            num_steps = self.num_steps
        if num_steps is None:
            num_steps = math.ceil(self.num_rows_read(num_rows) / self.rows_per_step)
        warmup_steps = self.warmup_steps or round((self.warmup_ratio or 0.0) * num_steps)
        if warmup_steps > num_steps:
            problem = Problem(
                "train.warmup_steps",
                got=f"{warmup_steps} for {num_rows} rows, which are {num_steps} steps",
                wanted=f"at most the steps of the run, {num_steps}",
                fix="lower train.warmup_steps, or give train.warmup_ratio instead",
            )
            raise ConfigError([problem])
        changes = {
            "num_steps": num_steps,
            "num_epochs": None,
            "warmup_steps": warmup_steps,
            "warmup_ratio": 0.0,
        }
        return self.model_copy(update=changes)

    def num_rows_read(self, num_rows: int) -> int:
        """Samples that the run trains on, repeats included; by num_steps only where these have a number of
        samples.
        """
        if self.num_steps is not None:
            return self.num_steps * self.rows_per_step
        return max(1, round((self.num_epochs or 1.0) * num_rows))


def _several_responses_differ(evaluation: EvalConfig) -> Problem | None:
    if evaluation.samples_per_prompt == 1 or evaluation.sampling.temperature > 0:
        return None
    return Problem(
        "samples_per_prompt",
        got=f"{evaluation.samples_per_prompt} with sampling.temperature=0 (greedy)",
        wanted="1: greedy responses to one prompt are all the same",
        fix="set eval.sampling.temperature above 0, or remove eval.samples_per_prompt",
    )


def _patience_has_evaluations(evaluation: SupervisedEvalConfig) -> Problem | None:
    if evaluation.patience is None or evaluation.every_steps is not None:
        return None
    return Problem(
        "patience",
        got=f"{evaluation.patience} without every_steps",
        wanted="evaluations during training, which patience counts",
        fix="set eval.every_steps, or remove eval.patience",
    )


class CheckpointConfig(Section):
    every_steps: Annotated[Count | Literal["auto"] | None, Wanted("an integer >= 1, auto or null")] = "auto"
    """Save every n steps; auto: 15 minutes after the last save; null: at the end only."""
    keep: Count = 2
    """How many checkpoints are kept."""
    optimizer: bool = True
    """Save optimizer states; false: weights alone, a seventh of the size, and moments restart from zero."""
    asynchronous: bool = False
    """Write shards to run.local_dir, and copy or upload them while training goes on."""
    export: bool = True
    """Write the trained model as a Hugging Face folder at the end."""
    best: bool = True
    """Keep an export of the model with the best evaluation so far in best/ (with eval.every_steps)."""


class SupervisedEvalConfig(Section):
    every_steps: Count | None = None
    """Evaluate every n steps, in addition to before the first and after the last."""
    num_samples: Count | None = None
    """Held-out samples used; all when left out."""
    metric: str = "loss"
    """Metric of best/ and patience, without its "eval/"; errors, losses and KLs are better when low."""
    patience: Count | None = None
    """Stop after this many consecutive evaluations without an improvement; null never does."""

    checks = (_patience_has_evaluations,)


class EvalConfig(Section):
    every_steps: Count | None = None
    """Evaluate every n steps, in addition to before the first and after the last."""
    num_prompts: Count | None = None
    """Held-out prompts used; all when left out."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()
    """Sampling of evaluation responses: by default greedy, with the rollout's length limit."""
    samples_per_prompt: Count = 1
    """Responses per held-out prompt; with 2 or more, pass@k for k = 1, 2, 4, … up to it."""
    pass_score: float = 1.0
    """Raw reward (weighted sum of the sources, before penalties and clip) from which a response passes."""
    show_samples: NaturalNumber = 5
    """Pairs of responses, before and after, in the summary."""

    checks = (_several_responses_differ,)
