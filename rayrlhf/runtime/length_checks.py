"""Checks sequence lengths against the models' maximum positions, from the config and config.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rayrlhf.config.base import Problem
from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.example_data import ExampleDataConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.positions import positions_of
from rayrlhf.models.weight_files import read_json


class Longest(NamedTuple):
    """The longest sequence that a setting allows."""

    key: str
    limit: int  # value of the key, in tokens
    prompt: int = 0  # data.max_prompt_tokens, if the sequence is a prompt and a response
    in_engine: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt + self.limit


def longest_sequences(config: Any) -> list[Longest]:
    """The longest sequences of any job. Those of engines are marked, because engines refuse sequences beyond
    a model's positions.
    """
    data, rollout = getattr(config, "data", None), getattr(config, "rollout", None)
    found = []
    if isinstance(data, ExampleDataConfig):
        found.append(Longest("data.max_tokens", data.max_tokens))
    if isinstance(data, PromptDataConfig) and rollout is not None:
        is_trained = isinstance(config, PolicyRunConfig)
        response = rollout.max_response_tokens if is_trained else rollout.sampling.max_new_tokens
        name = "rollout.sampling.max_new_tokens"
        if is_trained and rollout.environment is not None:
            name = "rollout.environment.max_response_tokens"
        found.append(_rollout(data, name, response))
        if is_trained and data.ptx is not None:
            found.append(Longest("data.ptx.max_tokens", data.ptx.max_tokens))
        if is_trained and config.eval_sampling.max_new_tokens > response:
            found.append(_rollout(data, "eval.sampling.max_new_tokens", config.eval_sampling.max_new_tokens))
    for stage in ("sft", "dpo"):
        if (section := getattr(config, stage, None)) is not None:
            found.append(Longest(f"{stage}.data.max_tokens", section.data.max_tokens))
    return found


def _rollout(data: PromptDataConfig, name: str, response: int) -> Longest:
    return Longest(name, response, data.max_prompt_tokens, in_engine=True)


def length_problems(config: Any, models: Sequence[tuple[str, str]]) -> Iterator[Problem]:
    """Settings that allow sequences which a model cannot read. `models`: (key, local folder) of the models
    that read the sequences.
    """
    for key, path, longest, positions, is_table in _too_long(config, models):
        if is_table or (longest.in_engine and key == "model.path"):
            reader = "the model" if is_table else "an engine"
            prompt = f" + data.max_prompt_tokens={longest.prompt}" if longest.prompt else ""
            yield Problem(
                longest.key,
                got=f"{longest.limit}{prompt}: sequences of up to {longest.tokens} tokens",
                wanted=f"{positions} tokens at most, which is what {reader} can read ({key}={path})",
                fix=f"lower {longest.key}{' or data.max_prompt_tokens' if prompt else ''}, or name a "
                "model with more positions",
            )


def length_warnings(config: Any, models: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Warnings for sequences that rotary positions allow but a model was not trained for."""
    for key, path, longest, positions, is_table in _too_long(config, models):
        if not is_table and not (longest.in_engine and key == "model.path"):
            yield (
                f"{longest.key} allows sequences of {longest.tokens} tokens; {key}={path} was trained for "
                f"{positions}, and extrapolates beyond"
            )


def _too_long(
    config: Any, models: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, Longest, int, bool]]:
    for key, path in models:
        limit, is_table = positions_of(read_json(Path(path) / "config.json"))
        for longest in longest_sequences(config):
            if limit is not None and longest.tokens > limit:
                yield key, path, longest, limit, is_table
