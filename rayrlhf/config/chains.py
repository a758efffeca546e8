"""Configs of jobs that chain stages (generate and score, choose, train), and of their stages."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rayrlhf.config.base import (
    ConfigError,
    Count,
    Fraction,
    NaturalNumber,
    NonNegativeNumber,
    Problem,
    Section,
)
from rayrlhf.config.common import ObserveConfig, RunSection
from rayrlhf.config.example_data import RewardTemplate, Share
from rayrlhf.config.generate import GenerateDataConfig, GenerateRunConfig, SampledConfig
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.learning_rates import PreferenceTrainConfig, SftTrainConfig
from rayrlhf.config.model import ModelConfig, TrainedModelConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.supervised import (
    NEEDS_REF,
    DpoRunConfig,
    PreferenceConfig,
    SftRunConfig,
    SupervisedConfig,
)
from rayrlhf.config.train import CheckpointConfig, SupervisedEvalConfig

RESPONSE, REWARD = "response", "reward"  # columns of the rows that are trained on
CHOSEN_FILE = "chosen.jsonl"
# Prompt keys copied to the training stage, so that it renders prompts the same.
TEXT_KEYS = (
    "prompt_key",
    "input_template",
    "apply_chat_template",
    "system_prompt",
    "system_key",
    "tools",
    "tools_key",
    "chat_template",
)
STAGE_SECTION = re.compile(r"(?<![\w.])(train|data|eval|checkpoint|algorithm)\.")


class RoundSection(Section):
    prompts_per_round: Count | None = None
    """Rows of data.train per round, each round the next ones; all of them when left out."""
    rows_per_shard: Count = 256
    """Rows that are written together; an interrupted stage loses the shards in progress."""
    retries: NaturalNumber = 1
    """How often a row whose generation failed is retried before it is left out."""
    max_failed_fraction: Fraction = 0.1
    """The run stops when more than this share of a shard's rows cannot be generated."""
    overwrite_columns: bool = False
    """Let the new columns (response, score, …) replace columns of these names in the data."""


class StageDataConfig(Section):
    max_tokens: Count = 2048
    """Longest sequence, in tokens: prompt and answer together."""
    on_long: Literal["fail", "drop", "truncate_head", "truncate_tail"] = "fail"
    """What to do with a longer one: stop and name it, drop it, cut off its beginning, or cut off its end."""
    eval_share: Share = 0.0
    """Share of the chosen rows that is held out for evaluation."""


def _stage_exports(stage: TrainStage) -> Problem | None:
    if stage.checkpoint.export:
        return None
    return Problem(
        "checkpoint.export",
        got="false",
        wanted="true: the next stage starts from the export",
        fix="remove checkpoint.export",
    )


class TrainStage(Section):
    """Fields of the training stages of all chains."""

    data: StageDataConfig = StageDataConfig()
    """Lengths, and what is held out."""
    train: SftTrainConfig = SftTrainConfig()
    """Optimizer and training steps, of every round."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    eval: SupervisedEvalConfig = SupervisedEvalConfig()
    """Evaluation on held-out samples."""

    checks = (_stage_exports,)


class ConditionalStage(TrainStage):
    reward_template: RewardTemplate = "Reward: {}\n"
    """Text put before the last user message, with {} where the reward goes."""


def _reference_is_used(stage: DpoStage) -> Problem | None:
    if stage.reference is None or stage.algorithm.loss in NEEDS_REF:
        return None
    return Problem(
        "reference",
        got=f"{stage.reference} with algorithm.loss={stage.algorithm.loss}",
        wanted="null: this loss uses no reference",
        fix="remove dpo.reference, or set dpo.algorithm.loss to dpo",
    )


class DpoStage(TrainStage):
    train: PreferenceTrainConfig = PreferenceTrainConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    """Optimizer and training steps, of every round."""
    algorithm: PreferenceConfig = PreferenceConfig()
    """The preference loss."""
    reference: Literal["previous", "start"] | None = None
    """The policy that a round starts from (previous, the default of losses that need one), or model.path."""
    precompute_ref: bool = False
    """Compute all reference log-probabilities before training and keep them on disk."""

    checks = (*TrainStage.checks, _reference_is_used)


class ChainConfig(Section):
    """Fields shared by the chains."""

    run: RunSection
    """Name, folder and seed; every stage is a separate run in the folder of this one."""
    model: TrainedModelConfig
    """The model that the first round starts from."""
    data: GenerateDataConfig
    """Prompts."""
    rollout: SampledConfig = SampledConfig()
    """Engines and sampling."""
    generate: RoundSection = RoundSection()
    """Which prompts a round generates for."""
    reward: RewardConfig
    """What scores the responses."""
    placement: PlacementConfig = PlacementConfig()
    """Which roles share slots, in every stage."""
    observe: ObserveConfig = ObserveConfig()
    """Console, TensorBoard, Weights & Biases."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how the job is launched; only `rayrlhf render` reads it."""

    def stage_folder(self, round_: int, name: str) -> Path:
        return Path(self.run.path) / f"{round_}-{name}"

    def generate_config(self, round_: int, model_path: str) -> GenerateRunConfig:
        """Config of a round's generation and scoring, with the model at `model_path`."""
        section = self.generate
        per_round = section.prompts_per_round
        return GenerateRunConfig.model_validate(
            {
                **self._shared(round_, "generate", model_path),
                "model": {**self.model.model_dump(include=set(ModelConfig.model_fields)), "path": model_path},
                "data": self.data,
                "rollout": self.rollout,
                "generate": {
                    **section.model_dump(exclude={"prompts_per_round"}),
                    "first_row": (round_ - 1) * (per_round or 0),
                    "num_rows": per_round,
                },
                "reward": self.reward,
            }
        )

    def _shared(self, round_: int, name: str, model_path: str) -> dict[str, Any]:
        """The sections that every stage has; each round has its own seed."""
        return {
            "run": {
                "name": f"{round_}-{name}",
                "dir": self.run.path,
                "seed": 1000 * self.run.seed + round_,
            },
            "model": self.model.model_copy(update={"path": model_path}),
            "placement": self.placement,
            "observe": self.observe,
        }

    def _training(self, round_: int, name: str, model_path: str, stage: TrainStage) -> dict[str, Any]:
        """Config tree of a training stage, without the keys that name its data columns."""
        text = {key: getattr(self.data, key) for key in TEXT_KEYS}
        chosen = self.stage_folder(round_, "choose") / CHOSEN_FILE
        return {
            **self._shared(round_, name, model_path),
            "data": {"train": f"jsonl@{chosen}", **text, **stage.data.model_dump()},
            "train": stage.train,
            "checkpoint": stage.checkpoint,
            "eval": stage.eval,
        }


def _group_has_a_choice(config: RejectionSamplingConfig | IterativeDpoConfig) -> Problem | None:
    if config.rollout.group_size >= 2:
        return None
    return Problem(
        "rollout.group_size",
        got=str(config.rollout.group_size),
        wanted="an integer >= 2: there must be something to choose from",
        fix="set rollout.group_size to 2 or more",
    )


def _problem_of(build: Callable[[], Section], section: str) -> Problem | None:
    """The first problem of a stage's own config, with the keys of the chain's config."""
    try:
        build()
    except ValidationError as error:
        for detail in error.errors():
            at = [str(part) for part in detail["loc"]]
            cause = detail.get("ctx", {}).get("error")
            if not isinstance(cause, ConfigError):
                return Problem(".".join(at), str(detail["input"]), detail["msg"], "correct it")
            found = cause.problems[0]
            path, *texts = (
                STAGE_SECTION.sub(rf"{section}.\1." if section else r"\1.", text)
                for text in (".".join([*at, found.path]), found.got, found.wanted, found.fix)
            )
            return Problem(path, *texts)
    return None


def _answers_can_be_generated(config: ChainConfig) -> Problem | None:
    if config.data.response_key is not None and not isinstance(config, ConditionalSftConfig):
        return None  # reported by `_no_responses_are_given`
    return _problem_of(lambda: config.generate_config(1, config.model.path), "")


def _chosen_rows_can_be_trained_on(
    config: RejectionSamplingConfig | IterativeDpoConfig | ConditionalSftConfig,
) -> Problem | None:
    section = "dpo" if isinstance(config, IterativeDpoConfig) else "sft"
    return _problem_of(lambda: config.training_config(1, config.model.path), section)


class ChoiceSection(Section):
    drop_truncated: bool = False
    """Leave out responses that were truncated by rollout.sampling.max_new_tokens."""
    min_score: float | None = None
    """Lowest score of a response to train on; null takes any."""


class PairSection(Section):
    drop_truncated: bool = False
    """Leave out responses that were truncated by rollout.sampling.max_new_tokens."""
    min_margin: NonNegativeNumber = 0.0
    """Scores of best and worst must differ by more than this; else they are a tie, which is left out."""


class LabelSection(Section):
    drop_truncated: bool = False
    """Leave out responses that were truncated by rollout.sampling.max_new_tokens."""
    normalize: bool = False
    """Subtract the mean of all scores and divide by their standard deviation."""
    decimals: NaturalNumber = 1
    """Decimal places of a label; with fewer labels each is trained on more responses."""


def _no_responses_are_given(config: RejectionSamplingConfig | IterativeDpoConfig) -> Problem | None:
    if config.data.response_key is None:
        return None
    return Problem(
        "data.response_key",
        got=config.data.response_key,
        wanted="null: responses are generated by the policy of each round",
        fix="remove data.response_key",
    )


class RejectionSamplingConfig(ChainConfig):
    job: Literal["rejection_sampling"] = "rejection_sampling"
    """Best of n: several responses per prompt, supervised fine-tuning on the one with the highest score."""
    num_rounds: Count = 1
    """Rounds; each generates with the model trained by the previous one."""
    score_last: bool = True
    """Generate and score once more with the last model, so that its mean score is known."""
    choose: ChoiceSection = ChoiceSection()
    """Which responses are trained on."""
    sft: TrainStage = TrainStage()
    """The supervised fine-tuning of every round."""

    checks = (
        _no_responses_are_given,
        _group_has_a_choice,
        _answers_can_be_generated,
        _chosen_rows_can_be_trained_on,
    )

    def training_config(self, round_: int, model_path: str) -> SupervisedConfig:
        tree = self._training(round_, "sft", model_path, self.sft)
        tree["data"] |= {"format": "prompt_response", "response_key": RESPONSE}
        return SftRunConfig.model_validate(tree)


class IterativeDpoConfig(ChainConfig):
    job: Literal["iterative_dpo"] = "iterative_dpo"
    """Rounds of generating, scoring, pairing best with worst, and training on the pairs."""
    num_rounds: Count = 3
    """Rounds; each generates with the model trained by the previous one."""
    score_last: bool = True
    """Generate and score once more with the last model, so that its mean score is known."""
    choose: PairSection = PairSection()
    """Which pairs are trained on."""
    dpo: DpoStage = DpoStage()
    """The preference learning of every round."""

    checks = (
        _no_responses_are_given,
        _group_has_a_choice,
        _answers_can_be_generated,
        _chosen_rows_can_be_trained_on,
    )

    def training_config(self, round_: int, model_path: str) -> SupervisedConfig:
        tree = self._training(round_, "dpo", model_path, self.dpo)
        tree["data"] |= {"format": "prompt"}
        tree["algorithm"] = self.dpo.algorithm
        if self.dpo.algorithm.loss in NEEDS_REF:
            path = self.model.path if self.dpo.reference == "start" else model_path
            if path == model_path and self.model.lora is not None:
                path = None  # the model with its adapters off: in memory once, and in the same 4 bits
            tree["ref"] = {"path": path, "precompute": self.dpo.precompute_ref}
        return DpoRunConfig.model_validate(tree)


class ConditionalSftConfig(ChainConfig):
    job: Literal["conditional_sft"] = "conditional_sft"
    """Supervised fine-tuning on responses conditioned on their reward (arXiv 2308.12050)."""
    choose: LabelSection = LabelSection()
    """The labels."""
    sft: ConditionalStage = Field(default=ConditionalStage())
    """The supervised fine-tuning."""

    checks = (_answers_can_be_generated, _chosen_rows_can_be_trained_on)

    @property
    def num_rounds(self) -> int:
        return 1

    @property
    def score_last(self) -> bool:
        return False

    def training_config(self, round_: int, model_path: str) -> SupervisedConfig:
        tree = self._training(round_, "sft", model_path, self.sft)
        tree["data"] |= {
            "format": "prompt_response",
            "response_key": RESPONSE,
            "reward_key": REWARD,
            "reward_template": self.sft.reward_template,
        }
        return SftRunConfig.model_validate(tree)


AnyChain = RejectionSamplingConfig | IterativeDpoConfig | ConditionalSftConfig

CHAINS: dict[str, Any] = {
    "rejection_sampling": RejectionSamplingConfig,
    "iterative_dpo": IterativeDpoConfig,
    "conditional_sft": ConditionalSftConfig,
}
