"""Configs of the supervised jobs: one class per job, by the name in `job`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from rayrlhf.config.base import Count, Fraction, NonNegativeNumber, PositiveNumber, Problem, Section, Wanted
from rayrlhf.config.common import ObserveConfig, TrainedRunSection
from rayrlhf.config.example_data import (
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.learning_rates import (
    DistillationTrainConfig,
    PreferenceTrainConfig,
    RewardTrainConfig,
    SftTrainConfig,
    with_lora_lr,
)
from rayrlhf.config.model import (
    TrainedModelConfig,
    compiled_weights_are_whole,
    reference_is_quantized,
    sequences_are_shared,
)
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.train import CheckpointConfig, SupervisedEvalConfig


def _longest_example_fits(config: SupervisedConfig) -> Problem | None:
    together = config.data.sequences_per_example
    longest = config.data.max_tokens * together
    if config.train.max_tokens_per_micro_batch >= longest:
        return None
    return Problem(
        "train.max_tokens_per_micro_batch",
        got=str(config.train.max_tokens_per_micro_batch),
        wanted=f"an integer >= {longest}, the longest sample: {f'{together} x ' if together > 1 else ''}"
        f"data.max_tokens={config.data.max_tokens}",
        fix=f"set train.max_tokens_per_micro_batch to {longest} or more, or lower data.max_tokens",
    )


def _evaluation_has_samples(config: SupervisedConfig) -> Problem | None:
    given = [key for key in ("every_steps", "num_samples") if getattr(config.eval, key) is not None]
    if config.data.has_eval or not given:
        return None
    return Problem(
        f"eval.{given[0]}",
        got=f"{getattr(config.eval, given[0])} without data.eval or data.eval_share",
        wanted="held-out samples",
        fix=f"give data.eval or data.eval_share, or remove eval.{' and eval.'.join(given)}",
    )


def _metric_is_known(config: SupervisedConfig) -> Problem | None:
    if config.eval.metric in config.eval_metrics:
        return None
    return Problem(
        "eval.metric",
        got=config.eval.metric,
        wanted="one of " + ", ".join(config.eval_metrics),
        fix="set eval.metric to one of them",
    )


def _ref_has_the_weights_of_the_start(config: SupervisedConfig) -> Problem | None:
    ref = getattr(config, "ref", None)
    if ref is None or config.model.quantization is None or ref.path != config.model.path:
        return None
    return reference_is_quantized(config.model, "ref.path", f"{ref.path}, which is model.path,")


def _workers_share_sequences(config: SupervisedConfig) -> Problem | None:
    return sequences_are_shared(config.model, config.train.num_workers, "train.num_workers")


def _compiled_weights_are_whole(config: SupervisedConfig) -> Problem | None:
    return compiled_weights_are_whole(config.model, config.train.zero_stage)


class SupervisedConfig(Section):
    """Fields shared by the supervised jobs; `data` and `train` have a class per job."""

    run: TrainedRunSection
    """Name, folder and seed."""
    model: TrainedModelConfig
    """The model to train."""
    data: Any  # every job's own ExampleDataConfig
    """Samples."""
    placement: PlacementConfig = PlacementConfig()
    """Which roles share slots."""
    train: Any  # every job's own SupervisedTrainConfig
    """Optimizer and training steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    eval: SupervisedEvalConfig = SupervisedEvalConfig()
    """Evaluation on held-out samples."""
    observe: ObserveConfig = ObserveConfig()
    """Console, TensorBoard, Weights & Biases."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how the job is launched; only `rayrlhf render` reads it."""

    eval_metrics: ClassVar[tuple[str, ...]] = ("loss",)

    @field_validator("train")
    @classmethod
    def _lr_of_adapters(cls, train: Any, info: ValidationInfo) -> Any:
        return with_lora_lr(train, info.data.get("model"))

    checks = (
        _longest_example_fits,
        _evaluation_has_samples,
        _metric_is_known,
        _workers_share_sequences,
        _compiled_weights_are_whole,
        _ref_has_the_weights_of_the_start,
    )


class SftRunConfig(SupervisedConfig):
    job: Literal["sft"] = "sft"
    """Supervised fine-tuning."""
    data: SftDataConfig
    """Conversations, prompts with responses, or plain text."""
    train: SftTrainConfig = SftTrainConfig()
    """Optimizer and training steps."""

    eval_metrics = ("loss", "entropy")


class RewardLossConfig(Section):
    loss: Literal["bradley_terry", "log_exp"] = "bradley_terry"
    """Pairwise loss; log_exp is the same number in another form."""
    margin: bool = True
    """Subtract the margin of the pair (data.margin_key) where it has one."""


class RmRunConfig(SupervisedConfig):
    job: Literal["rm"] = "rm"
    """A reward model from pairs."""
    data: PairDataConfig
    """Pairs of a chosen and a rejected response."""
    algorithm: RewardLossConfig = RewardLossConfig()
    """The pairwise loss."""
    train: RewardTrainConfig = RewardTrainConfig()
    """Optimizer and training steps."""

    eval_metrics = ("loss", "accuracy", "margin", "calibration_error")


class StepLossConfig(Section):
    reward_tokens: list[str] | None = Field(default=None, min_length=2, max_length=2)
    """Words for a bad and a good step, one token each, whose rows initialise the new head; null is zeros."""


class PrmRunConfig(SupervisedConfig):
    job: Literal["prm"] = "prm"
    """A process reward model from labelled steps."""
    data: PrmDataConfig
    """Solutions in steps with a label each."""
    algorithm: StepLossConfig = StepLossConfig()
    """The head."""
    train: RewardTrainConfig = RewardTrainConfig()
    """Optimizer and training steps."""

    eval_metrics = ("loss", "accuracy", "accuracy_good", "accuracy_bad")


class FrozenRefConfig(Section):
    path: str | None = None
    """Folder or hub id of the reference; the initial model when left out."""
    precompute: bool = False
    """Compute all reference log-probabilities before training, keep them on disk and free the reference."""


NEEDS_REF = ("dpo", "ipo", "cdpo")


def _ref_is_used(config: DpoRunConfig) -> Problem | None:
    if config.ref is None or config.needs_ref:
        return None
    return Problem(
        "ref",
        got=f"a section ref with algorithm.loss={config.algorithm.loss}",
        wanted="no ref: this loss uses no reference",
        fix="remove the section ref (on the command line: ref=null), or set algorithm.loss to dpo",
    )


def _smoothing_is_used(algorithm: PreferenceConfig) -> Problem | None:
    if (algorithm.label_smoothing > 0) == (algorithm.loss == "cdpo"):
        return None
    if algorithm.loss == "cdpo":
        return Problem(
            "label_smoothing",
            got="0 with loss=cdpo",
            wanted="a number > 0 and < 0.5: how often a label is taken to be wrong",
            fix="set algorithm.label_smoothing (for example to 0.1), or algorithm.loss to dpo",
        )
    return Problem(
        "label_smoothing",
        got=f"{algorithm.label_smoothing:g} with loss={algorithm.loss}",
        wanted="0: only cdpo smooths labels",
        fix="set algorithm.loss to cdpo, or remove algorithm.label_smoothing",
    )


def _target_margin_is_used(algorithm: PreferenceConfig) -> Problem | None:
    if algorithm.loss == "simpo" or not algorithm.gamma:
        return None
    return Problem(
        "gamma",
        got=f"{algorithm.gamma:g} with loss={algorithm.loss}",
        wanted="0: only simpo has a target margin",
        fix="set algorithm.loss to simpo, or remove algorithm.gamma",
    )


class PreferenceConfig(Section):
    loss: Literal["dpo", "ipo", "cdpo", "orpo", "simpo"] = "dpo"
    """arXiv 2305.18290, 2310.12036, dpo with smoothed labels, 2403.07691 and 2405.14734."""
    beta: PositiveNumber = 0.1
    """Strength of the pull to the reference; for orpo the weight of the odds ratio."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong (cdpo)."""
    gamma: NonNegativeNumber = 0.0
    """Target margin of simpo."""
    nll_coef: NonNegativeNumber = 0.0
    """Weight of the chosen response's negative log-likelihood per token (arXiv 2404.19733)."""

    checks = (_smoothing_is_used, _target_margin_is_used)


class DpoRunConfig(SupervisedConfig):
    job: Literal["dpo"] = "dpo"
    """Direct preference optimisation and related losses."""
    data: PairDataConfig
    """Pairs of a chosen and a rejected response."""
    algorithm: PreferenceConfig = PreferenceConfig()
    """The preference loss."""
    ref: FrozenRefConfig | None = None
    """The reference; null with orpo and simpo."""
    train: PreferenceTrainConfig = PreferenceTrainConfig()
    """Optimizer and training steps."""

    eval_metrics = ("loss", "accuracy", "margin", "chosen", "rejected", "nll", "calibration_error")
    checks = (*SupervisedConfig.checks, _ref_is_used)

    @field_validator("ref")
    @classmethod
    def _default_ref(cls, ref: FrozenRefConfig | None, info: ValidationInfo) -> FrozenRefConfig | None:
        """Fill in defaults if a reference is needed, so that the resolved config shows them."""
        algorithm = info.data.get("algorithm")
        needed = algorithm is not None and algorithm.loss in NEEDS_REF
        return FrozenRefConfig() if ref is None and needed else ref

    @property
    def needs_ref(self) -> bool:
        return self.algorithm.loss in NEEDS_REF


class KtoConfig(Section):
    beta: PositiveNumber = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: PositiveNumber = 1.0
    """Weight of desirable responses; raise it where there are few (arXiv 2402.01306, section 4.2)."""
    undesirable_weight: PositiveNumber = 1.0
    """Weight of undesirable responses."""


class KtoRunConfig(SupervisedConfig):
    job: Literal["kto"] = "kto"
    """Kahneman-Tversky optimisation from single responses."""
    data: KtoDataConfig
    """Single responses with a label each."""
    algorithm: KtoConfig = KtoConfig()
    """The loss."""
    ref: FrozenRefConfig = FrozenRefConfig()
    """The reference."""
    train: PreferenceTrainConfig = PreferenceTrainConfig()
    """Optimizer and training steps."""

    eval_metrics = ("loss", "accuracy", "desirable", "undesirable", "mismatched")


def _teacher_replicas_are_served(config: TeacherConfig) -> Problem | None:
    if config.location == "serve" or config.num_replicas == 1:
        return None
    return Problem(
        "num_replicas",
        got=f"{config.num_replicas} with location=worker",
        wanted="no replicas: with location=worker every training worker holds its own copy",
        fix="set teacher.location to serve, or remove teacher.num_replicas",
    )


class TeacherConfig(Section):
    path: str = Field(min_length=1)
    """Folder or hub id of the teacher; it has the student's vocabulary."""
    location: Literal["worker", "serve"] = "worker"
    """A frozen copy in every training worker, or replicas behind Ray Serve that return their top_k tokens."""
    top_k: Count = 64
    """Tokens per position that a served teacher returns; the remaining probability is one number."""
    num_replicas: Count = 1
    """Serve replicas (with location: serve)."""
    timeout_seconds: PositiveNumber = 600
    """Deadline of a served teacher's answer."""

    checks = (_teacher_replicas_are_served,)


class DistillationConfig(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher) (arXiv 2306.08543), or Jensen-Shannon (2306.13649)."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1), Wanted("a number > 0 and < 1")] = 0.5
    """Weight of the teacher in the mixture of jsd."""
    kd_coef: Fraction = 0.5
    """The loss is (1 - kd_coef) * cross-entropy + kd_coef * divergence."""


def _teachers_read_whole_sequences(config: KdRunConfig) -> Problem | None:
    if config.model.sequence_parallel == 1:
        return None
    return Problem(
        "model.sequence_parallel",
        got=str(config.model.sequence_parallel),
        wanted="1 in distillation: a teacher scores whole sequences",
        fix="remove model.sequence_parallel; train.gradient_checkpointing and a lower "
        "train.max_tokens_per_micro_batch save memory too",
    )


class KdRunConfig(SupervisedConfig):
    job: Literal["kd"] = "kd"
    """Knowledge distillation."""
    data: SftDataConfig
    """Conversations, prompts with responses, or plain text."""
    teacher: TeacherConfig
    """The teacher."""
    algorithm: DistillationConfig = DistillationConfig()
    """The divergence."""
    train: DistillationTrainConfig = DistillationTrainConfig()
    """Optimizer and training steps."""

    eval_metrics = ("loss", "divergence", "nll")

    checks = (*SupervisedConfig.checks, _teachers_read_whole_sequences)


JOBS: dict[str, Any] = {
    "sft": SftRunConfig,
    "rm": RmRunConfig,
    "prm": PrmRunConfig,
    "dpo": DpoRunConfig,
    "kto": KtoRunConfig,
    "kd": KdRunConfig,
}
