"""Rows for preference learning: a prompt with a chosen and a rejected answer, or with a judged answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.config.example_data import KtoDataConfig, PairDataConfig
from rayrlhf.data.rows.columns import (
    MESSAGES_NAMES,
    PROMPT_NAMES,
    RESPONSE_NAMES,
    Shape,
    pick,
    pick_or_fail,
    recognise,
)
from rayrlhf.data.rows.images import ImageRef
from rayrlhf.data.rows.messages import (
    HH_TURN,
    Message,
    answer_message,
    check_trained,
    check_turns,
    conversation_of,
    conversation_with,
    prompt_messages,
    text_or_messages,
    transcript_of,
)
from rayrlhf.data.rows.row import BadRow, check_text, column_of, quoted, type_name

SCORE_NAMES = ("score_chosen", "score_rejected")


@dataclass(frozen=True)
class Pair:
    """Two different answers to one prompt."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    margin: float = 0.0
    tools: list[dict[str, Any]] | None = None
    images: list[ImageRef] = field(default_factory=list)  # of the prompt


@dataclass(frozen=True)
class Judged:
    """An answer labelled as desirable or not."""

    prompt: list[Message]
    response: Message
    desirable: bool
    tools: list[dict[str, Any]] | None = None
    images: list[ImageRef] = field(default_factory=list)  # of the prompt


def pair_of(columns: Mapping[str, Any], config: PairDataConfig) -> Pair:
    """The pair in a row. Raises `BadRow`, also if the two answers have different prompts or are equal."""
    chosen = column_of(columns, config.chosen_key, "data.chosen_key")
    rejected = column_of(columns, config.rejected_key, "data.rejected_key")
    for key, answer in ((config.chosen_key, chosen), (config.rejected_key, rejected)):
        if answer is None or isinstance(answer, bool | int | float):
            raise BadRow(f"column {key!r} holds {type_name(answer)}; wanted a text or messages")
    format_ = config.format if config.format != "auto" else _recognised_pair(columns, config)
    answers = (config.chosen_key, chosen), (config.rejected_key, rejected)
    if format_ == "prompt":
        key = pick_or_fail(columns, config.prompt_key, PROMPT_NAMES, "data.prompt_key")
        prompt = prompt_messages(columns[key], f"column {key!r}")
        better, worse = (answer_message(answer, f"column {key!r}") for key, answer in answers)
    else:
        read = conversation_of
        if format_ == "hh":
            read = transcript_of if config.apply_chat_template else _raw_transcript_of
        first, second = (
            _split(read(answer, f"column {key!r}"), f"column {key!r}") for key, answer in answers
        )
        if first[0] != second[0]:
            raise BadRow(
                f"the conversations in columns {quoted((config.chosen_key, config.rejected_key))} differ "
                "before their last answers; wanted two answers to one prompt"
            )
        prompt, better, worse = first[0], first[1], second[1]
    conversation = conversation_with(prompt, columns, config)
    prompt = conversation.messages
    check_turns([*prompt, better], f"the conversation with column {config.chosen_key!r}")
    check_turns([*prompt, worse], f"the conversation with column {config.rejected_key!r}")
    check_trained(better, f"the answer in column {config.chosen_key!r}")
    check_trained(worse, f"the answer in column {config.rejected_key!r}")
    if better == worse:
        raise BadRow(f"columns {quoted((config.chosen_key, config.rejected_key))} hold the same answer")
    return Pair(prompt, better, worse, _margin(columns, config), conversation.tools, conversation.images)


def _recognised_pair(columns: Mapping[str, Any], config: PairDataConfig) -> str:
    chosen = columns[config.chosen_key]
    prompt_key = pick(columns, config.prompt_key, PROMPT_NAMES)
    found = _read(chosen, f"column {config.chosen_key!r}")
    whole = not isinstance(found, str) and found[0]["role"] != "assistant"
    is_hh = isinstance(found, str) and prompt_key is None and HH_TURN.match(found) is not None
    both = f"{config.chosen_key}, {config.rejected_key}"
    shapes = [
        Shape("prompt", f"{'/'.join(PROMPT_NAMES)} and {both}", prompt_key is not None and not whole),
        Shape("messages", f"whole conversations in {both}", whole),
        Shape("hh", f"texts of 'Human:' and 'Assistant:' turns in {both}", is_hh),
    ]
    return recognise(columns, shapes)


def _read(answer: Any, where: str) -> str | list[Message]:
    return text_or_messages([answer] if isinstance(answer, Mapping) else answer, where)


def _split(messages: list[Message], where: str) -> tuple[list[Message], Message]:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadRow(f"{where} does not end with an assistant message after a prompt")
    return messages[:-1], messages[-1]


def _raw_transcript_of(text: Any, where: str) -> list[Message]:
    """For a model without a chat template, the transcript up to its last answer is the prompt."""
    transcript_of(text, where)  # raises if it is not a transcript
    start = list(HH_TURN.finditer(text))[-1]
    answer = text[start.end() :]
    check_text(answer, f"the last answer in {where}")
    if start[1] != "Assistant":
        raise BadRow(f"{where} does not end with an assistant message after a prompt")
    return [
        {"role": "user", "content": text[: start.end()]},
        {"role": "assistant", "content": answer},
    ]


def _margin(columns: Mapping[str, Any], config: PairDataConfig) -> float:
    if config.margin_key is not None:
        value = column_of(columns, config.margin_key, "data.margin_key")
        return _finite(value, f"the margin column {config.margin_key!r}")
    if columns.get("margin") is not None:
        return _finite(columns["margin"], "the margin column 'margin'")
    if all(columns.get(name) is not None for name in SCORE_NAMES):
        better, worse = (_finite(columns[name], f"column {name!r}") for name in SCORE_NAMES)
        return better - worse
    return 0.0


def _finite(value: Any, where: str) -> float:
    if isinstance(value, str):  # numbers in CSV files
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"{where} holds {value!r}; wanted a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        held = value if isinstance(value, float) else type_name(value)
        raise BadRow(f"{where} holds {held}; wanted a finite number")
    return float(value)


def judged_of(columns: Mapping[str, Any], config: KtoDataConfig) -> Judged:
    """The judged answer in a row. Raises `BadRow`."""
    desirable = _truth(column_of(columns, config.label_key, "data.label_key"), config.label_key)
    format_ = config.format if config.format != "auto" else _recognised_judged(columns, config)
    if format_ == "messages":
        key = pick_or_fail(columns, config.messages_key, MESSAGES_NAMES, "data.messages_key")
        prompt, response = _split(conversation_of(columns[key], f"column {key!r}"), f"column {key!r}")
    else:
        prompt_key = pick_or_fail(columns, config.prompt_key, PROMPT_NAMES, "data.prompt_key")
        response_key = pick_or_fail(columns, config.response_key, RESPONSE_NAMES, "data.response_key")
        prompt = prompt_messages(columns[prompt_key], f"column {prompt_key!r}")
        response = answer_message(columns[response_key], f"column {response_key!r}")
    conversation = conversation_with(prompt, columns, config)
    prompt = conversation.messages
    check_turns([*prompt, response], "the conversation")
    check_trained(response, "the judged answer")
    return Judged(prompt, response, desirable, conversation.tools, conversation.images)


def _recognised_judged(columns: Mapping[str, Any], config: KtoDataConfig) -> str:
    prompted = pick(columns, config.prompt_key, PROMPT_NAMES) is not None
    answered = pick(columns, config.response_key, RESPONSE_NAMES) is not None
    keys_given = config.prompt_key is not None or config.response_key is not None
    names = f"{'/'.join(PROMPT_NAMES)} and {'/'.join(RESPONSE_NAMES)}"
    in_messages = pick(columns, config.messages_key, MESSAGES_NAMES) is not None
    shapes = [
        Shape("prompt_response", names, prompted and answered, keys_given),
        Shape("messages", "messages or conversations", in_messages, config.messages_key is not None),
    ]
    return recognise(columns, shapes)


def _truth(value: Any, key: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):  # booleans in CSV files
        return value.lower() == "true"
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise BadRow(f"the label column {key!r} holds {value!r}; wanted true or false")
