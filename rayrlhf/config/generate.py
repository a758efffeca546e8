"""Config of batch inference: a data set of prompts, engines, and optional rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayrlhf.config.base import Count, Fraction, NaturalNumber, Problem, Section
from rayrlhf.config.common import ObserveConfig, RunSection
from rayrlhf.config.data import PromptDataConfig, Sources
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.rollout import EngineConfig


def _rows_are_only_answered(data: GenerateDataConfig) -> Problem | None:
    reasons = {
        "eval": "no source: every row is one of data.train",
        "ptx": "null: nothing is trained",
        "shuffle": "false: rows come out in the order in which they go in",
    }
    for key, reason in reasons.items():
        if getattr(data, key):
            return Problem(key, got="a value", wanted=reason, fix=f"remove data.{key}")
    return None


class GenerateDataConfig(PromptDataConfig):
    train: Sources = Field(min_length=1)
    """Sources of the rows to answer; a plain path or a list of paths will do."""
    shuffle: bool = False
    """Always false: rows come out in the order in which they go in."""
    response_key: str | None = None
    """Column with responses to score as they are; null generates them."""

    checks = (*PromptDataConfig.checks, _rows_are_only_answered)


def _several_samples_differ(rollout: SampledConfig) -> Problem | None:
    if rollout.group_size == 1 or rollout.sampling.temperature > 0:
        return None
    return Problem(
        "group_size",
        got=f"{rollout.group_size} with sampling.temperature=0 (greedy)",
        wanted="1: greedy responses to one prompt are all the same",
        fix="set rollout.sampling.temperature above 0, or rollout.group_size to 1",
    )


class SampledConfig(EngineConfig):
    """`rollout` of jobs that write responses instead of updating a policy with them: they may be greedy."""

    checks = (*EngineConfig.checks, _several_samples_differ)


class GenerateSection(Section):
    output: str | None = Field(default=None, min_length=1)
    """JSON-lines file with the answered rows; generations.jsonl in the run folder when left out."""
    first_row: NaturalNumber = 0
    """Begin with this row, counted from 0; past the last row it wraps around to the first."""
    num_rows: Count | None = None
    """How many rows; all when left out."""
    rows_per_shard: Count = 256
    """Rows that are written together; an interrupted run loses the shards in progress."""
    retries: NaturalNumber = 1
    """How often a row whose generation failed is retried before it is written with an error."""
    max_failed_fraction: Fraction = 0.1
    """The run stops when more than this share of a shard's rows cannot be generated."""
    overwrite_columns: bool = False
    """Let the new columns (response, score, …) replace columns of these names in the data."""


def _given_responses_are_scored(config: GenerateRunConfig) -> Problem | None:
    if config.data.response_key is None or config.reward is not None:
        return None
    return Problem(
        "data.response_key",
        got=f"{config.data.response_key} without a section reward",
        wanted="something that scores the responses: they are not generated",
        fix="give reward.sources, or remove data.response_key",
    )


def _given_responses_are_single(config: GenerateRunConfig) -> Problem | None:
    if config.data.response_key is None or config.rollout.group_size == 1:
        return None
    return Problem(
        "rollout.group_size",
        got=f"{config.rollout.group_size} with data.response_key={config.data.response_key}",
        wanted="1: each row has one response already",
        fix="remove rollout.group_size, or data.response_key",
    )


def rewards_without_order(reward: RewardConfig | None) -> Problem | None:
    """A row's score must depend neither on the rows before it nor on an environment."""
    for index, source in enumerate(reward.sources if reward else []):
        if source.normalize:
            return Problem(
                f"reward.sources.{index}.normalize",
                got="true",
                wanted="false: a row's score would depend on the rows that were scored before it",
                fix="remove normalize from the source",
            )
        if source.type == "environment":
            return Problem(
                f"reward.sources.{index}.type",
                got="environment",
                wanted="a source that scores responses: this job runs no episodes",
                fix="take another reward source",
            )
    return None


def labels_where_needed(reward: RewardConfig | None, data: PromptDataConfig) -> Problem | None:
    indices = [i for i, source in enumerate(reward.sources if reward else []) if source.type == "math"]
    if not indices or data.label_key is not None:
        return None
    return Problem(
        "data.label_key",
        got=f"null with reward.sources.{indices[0]}.type=math",
        wanted="the column with the reference answer",
        fix="set data.label_key to its name",
    )


def _rewards_have_no_order(config: GenerateRunConfig) -> Problem | None:
    return rewards_without_order(config.reward)


def _labels_are_there(config: GenerateRunConfig) -> Problem | None:
    return labels_where_needed(config.reward, config.data)


def _overlong_buffer_fits(config: GenerateRunConfig) -> Problem | None:
    return overlong_buffer_fits(config.reward, config.rollout)


def overlong_buffer_fits(reward: RewardConfig | None, rollout: EngineConfig) -> Problem | None:
    longest = rollout.sampling.max_new_tokens
    if reward is None or reward.overlong is None or reward.overlong.buffer_tokens < longest:
        return None
    return Problem(
        "reward.overlong.buffer_tokens",
        got=f"{reward.overlong.buffer_tokens} with responses of at most {longest} tokens",
        wanted="fewer: the penalty begins that many tokens before the limit",
        fix="lower reward.overlong.buffer_tokens",
    )


class GenerateRunConfig(Section):
    job: Literal["generate"] = "generate"
    """Batch inference over a data set of prompts."""
    run: RunSection
    """Name, folder and seed."""
    model: ModelConfig
    """The model that generates."""
    data: GenerateDataConfig
    """Prompts."""
    rollout: SampledConfig = SampledConfig()
    """Engines and sampling."""
    generate: GenerateSection = GenerateSection()
    """Which rows to answer, and the output file."""
    reward: RewardConfig | None = None
    """What scores the responses; null scores none."""
    placement: PlacementConfig = PlacementConfig()
    """Which roles share slots."""
    observe: ObserveConfig = ObserveConfig()
    """Console."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how the job is launched; only `rayrlhf render` reads it."""

    checks = (
        _given_responses_are_scored,
        _given_responses_are_single,
        _rewards_have_no_order,
        _labels_are_there,
        _overlong_buffer_fits,
    )
