"""`data` of supervised training: row formats, which tokens have a loss, and length limits."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayrlhf.config.base import Count, Problem, Wanted
from rayrlhf.config.data import DataConfig, Key, SourceConfig

Share = Annotated[float, Field(ge=0, lt=1)]
RewardTemplate = Annotated[str, Field(pattern=r"\{\}"), Wanted("a text with {} where the reward goes")]


def _one_way_to_hold_out(data: ExampleDataConfig) -> Problem | None:
    if not data.eval or not data.eval_share:
        return None
    return Problem(
        "eval_share",
        got=f"{data.eval_share:g} with data.eval={', '.join(source.path for source in data.eval)}",
        wanted="one of the two: held-out files, or a share of the training rows",
        fix="remove data.eval_share or data.eval",
    )


def _duplicates_have_an_id(data: ExampleDataConfig) -> Problem | None:
    if data.on_duplicate_id == "fail" or data.id_key is not None:
        return None
    return Problem(
        "on_duplicate_id",
        got=f"{data.on_duplicate_id} without data.id_key",
        wanted="the column that identifies rows",
        fix="name it in data.id_key, or remove data.on_duplicate_id",
    )


def _mixing_has_probabilities(data: ExampleDataConfig) -> Problem | None:
    if data.mixing_stops == "first_exhausted" or any(s.probability is not None for s in data.train):
        return None
    return Problem(
        "mixing_stops",
        got=f"{data.mixing_stops}, but no source has a probability",
        wanted="sources with probabilities: without them every row comes once, source after source",
        fix="give every source a probability, or remove data.mixing_stops",
    )


class ExampleDataConfig(DataConfig):
    """Fields shared by the data sections of SFT, pairs, KTO and step labels."""

    sequences_per_example: ClassVar[int] = 1  # which must be in one micro-batch

    eval_share: Share = 0.0
    """Share of the training rows that is held out for evaluation, by a hash of the row and run.seed."""
    train_split: Key | None = None
    """Split to train on, in hub data sets and folders that hold several; null takes train."""
    eval_split: Key | None = None
    """Split to evaluate on; null takes test, else eval, else validation."""
    id_key: Key | None = None
    """Column that identifies rows; null looks for no duplicates."""
    on_duplicate_id: Literal["fail", "skip"] = "fail"
    """What to do with a row whose id was seen before: stop and name it, or skip and count it."""
    max_tokens: Count = 2048
    """Longest sequence, in tokens: prompt and answer together."""
    on_long: Literal["fail", "drop", "truncate_head", "truncate_tail"] = "fail"
    """What to do with a longer one: stop and name it, drop it, cut off its beginning, or cut off its end."""
    mixing_stops: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With probabilities: end when the first source is exhausted, or repeat sources until all were read."""

    checks = (
        *DataConfig.checks,
        _one_way_to_hold_out,
        _duplicates_have_an_id,
        _mixing_has_probabilities,
    )

    @property
    def has_eval(self) -> bool:
        return bool(self.eval) or self.eval_share > 0

    def sources_of(self, split: Literal["train", "eval"]) -> list[SourceConfig]:
        """The sources of a split; with `eval_share` both splits are taken from `train`."""
        return self.eval if split == "eval" and not self.eval_share else self.train


def _plain_text_has_loss_everywhere(data: SftDataConfig) -> Problem | None:
    if data.format != "text":
        return None
    if data.learn != "all":
        return Problem(
            "learn",
            got=f"{data.learn} with data.format=text",
            wanted="all: a plain text has no answers to pick out",
            fix="set data.learn to all",
        )
    given = [
        key for key in ("system_prompt", "input_template", "reward_key") if getattr(data, key) is not None
    ]
    if not given:
        return None
    return Problem(
        given[0],
        got=f"{getattr(data, given[0])!r} with data.format=text",
        wanted="nothing around a plain text: it is trained on as it is",
        fix=f"remove data.{' and data.'.join(given)}",
    )


def _a_reward_has_its_template(data: SftDataConfig) -> Problem | None:
    if (data.reward_key is None) == (data.reward_template is None):
        return None
    missing = "reward_template" if data.reward_template is None else "reward_key"
    given = "reward_key" if missing == "reward_template" else "reward_template"
    words = "a text with {} for the reward" if missing == "reward_template" else "the column with the reward"
    return Problem(
        missing,
        got=f"nothing, with data.{given}={getattr(data, given)!r}",
        wanted=f"{words}: conditional SFT needs both",
        fix=f"give data.{missing}, or remove data.{given}",
    )


class SftDataConfig(ExampleDataConfig):
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_response", "text"] = "auto"
    """Shape of the rows; auto recognises it by the columns."""
    learn: Literal["responses", "last_response", "all"] = "responses"
    """Tokens with a loss: the assistant's turns, its last turn, or all (continued pretraining)."""
    messages_key: Key | None = None
    """Column with {role, content} or {from, value} messages; null takes messages or conversations."""
    prompt_key: Key | None = None
    """Column with the prompt; null takes prompt, question, instruction or query."""
    response_key: Key | None = None
    """Column with the answer; null takes response, completion, answer or output."""
    text_key: Key | None = None
    """Column with a plain text; null takes text."""
    reward_key: Key | None = None
    """Column with a reward that the answer is conditioned on (conditional SFT, arXiv 2308.12050)."""
    reward_template: RewardTemplate | None = None
    """Text put before the last user message, with {} where the reward goes, for example 'Reward: {}\\n'."""

    checks = (*ExampleDataConfig.checks, _plain_text_has_loss_everywhere, _a_reward_has_its_template)


class PairDataConfig(ExampleDataConfig):
    sequences_per_example: ClassVar[int] = 2  # chosen, rejected

    format: Literal["auto", "prompt", "messages", "hh"] = "auto"
    """Shape of the rows: a prompt and two answers, two conversations, two Human/Assistant transcripts."""
    prompt_key: Key | None = None
    """Column with the prompt, a text or messages; null takes prompt, question, instruction or query."""
    chosen_key: Key = "chosen"
    """Column with the better answer: a text, messages that follow the prompt, or the whole conversation."""
    rejected_key: Key = "rejected"
    """Column with the worse answer."""
    margin_key: Key | None = None
    """Column with the margin; null takes margin, else score_chosen - score_rejected, else 0."""


class KtoDataConfig(ExampleDataConfig):
    sequences_per_example: ClassVar[int] = 2  # with its own response, and with another prompt's

    format: Literal["auto", "prompt_response", "messages"] = "auto"
    """Shape of the rows; auto recognises it by the columns."""
    messages_key: Key | None = None
    """Column with a conversation that ends with the judged answer; null takes messages or conversations."""
    prompt_key: Key | None = None
    """Column with the prompt, a text or messages; null takes prompt, question, instruction or query."""
    response_key: Key | None = None
    """Column with the judged answer; null takes completion, response, answer or output."""
    label_key: Key = "label"
    """Column that says whether the answer is desirable: true or false."""


class PrmDataConfig(ExampleDataConfig):
    format: Literal["auto", "steps", "prm800k", "math_shepherd"] = "auto"
    """Shape of the rows: lists of steps and labels, PRM800K's, or Math-Shepherd's marked texts."""
    step_token: str = Field(min_length=1)
    """Text put after every step, where the step is judged; exactly one token of the tokenizer."""
    prompt_key: Key | None = None
    """Column with the problem; null takes prompt, question, instruction, query or problem."""
    steps_key: Key | None = None
    """Column with the steps, a list of texts; null takes steps or completions."""
    labels_key: Key | None = None
    """Column with one label per step; null takes labels or ratings."""
    label_scale: Literal["auto", "unit", "rating"] = "auto"
    """unit: true/false, +/-, good/bad, 0 to 1. rating: -1, 0 or 1. auto: rating for prm800k."""
    neutral: Literal["positive", "negative", "half", "ignore"] = "positive"
    """Training label of a rating of 0: 1 (as in arXiv 2305.20050), 0, 0.5, or no loss on it."""
