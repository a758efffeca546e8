"""Rows for SFT and distillation: conversations, prompts with responses, plain texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayrlhf.config.example_data import SftDataConfig
from rayrlhf.data.rows.columns import (
    MESSAGES_NAMES,
    PROMPT_NAMES,
    RESPONSE_NAMES,
    Shape,
    pick,
    pick_or_fail,
    recognise,
)
from rayrlhf.data.rows.images import prefixed
from rayrlhf.data.rows.messages import (
    Conversation,
    Message,
    answer_message,
    check_turns,
    conversation_of,
    conversation_with,
    prompt_messages,
    text_or_messages,
)
from rayrlhf.data.rows.row import BadRow, check_text, column_of, type_name


@dataclass(frozen=True)
class Text:
    """A plain text, trained on as a whole."""

    text: str


def conversation_or_text(columns: Mapping[str, Any], config: SftDataConfig) -> Conversation | Text:
    """The example in a row of SFT data. Raises `BadRow`."""
    format_ = config.format if config.format != "auto" else _recognised(columns, config)
    if format_ == "text":
        return _text(columns, config)
    where = "the conversation"
    if format_ in ("messages", "sharegpt"):
        key = pick_or_fail(columns, config.messages_key, MESSAGES_NAMES, "data.messages_key")
        where = f"column {key!r}"
        messages = conversation_of(columns[key], where)
    elif format_ == "alpaca":
        messages = _alpaca(columns, config)
    else:
        prompt_key = pick_or_fail(columns, config.prompt_key, PROMPT_NAMES, "data.prompt_key")
        response_key = pick_or_fail(columns, config.response_key, RESPONSE_NAMES, "data.response_key")
        messages = [
            *prompt_messages(columns[prompt_key], f"column {prompt_key!r}"),
            *_answer_messages(columns[response_key], f"column {response_key!r}"),
        ]
    conversation = conversation_with(messages, columns, config)
    check_turns(conversation.messages, where)
    messages = _up_to_last_answer(conversation.messages, where, config)
    return replace(conversation, messages=_conditioned(messages, columns, config))


def _recognised(columns: Mapping[str, Any], config: SftDataConfig) -> str:
    messages_key = pick(columns, config.messages_key, MESSAGES_NAMES)
    alpaca = all(isinstance(columns.get(name), str) for name in ("instruction", "output"))
    prompted = pick(columns, config.prompt_key, PROMPT_NAMES) is not None
    answered = pick(columns, config.response_key, RESPONSE_NAMES) is not None
    keys_given = config.prompt_key is not None or config.response_key is not None
    text = pick(columns, config.text_key, ("text",)) is not None
    shapes = [
        Shape("messages", "messages or conversations", messages_key is not None, bool(config.messages_key)),
        Shape("alpaca", "instruction, input, output", alpaca and not keys_given),
        Shape(
            "prompt_response",
            f"{'/'.join(PROMPT_NAMES)} and {'/'.join(RESPONSE_NAMES)}",
            prompted and answered and (keys_given or not alpaca),
            keys_given,
        ),
        Shape("text", "text", text, config.text_key is not None),
    ]
    return recognise(columns, shapes)


def _text(columns: Mapping[str, Any], config: SftDataConfig) -> Text:
    key = config.text_key or "text"
    text = column_of(columns, key, "data.text_key")
    if not isinstance(text, str):
        raise BadRow(f"column {key!r} holds {type_name(text)}; wanted a text")
    check_text(text, f"column {key!r}")
    if config.learn != "all":
        raise BadRow(
            f"column {key!r} is a text without separate answers; set data.learn=all to train on all of it"
        )
    return Text(text)


def _alpaca(columns: Mapping[str, Any], config: SftDataConfig) -> list[Message]:
    """instruction and input, separated by a blank line, form the user message; `history` precedes it."""
    prompt_key, response_key = config.prompt_key or "instruction", config.response_key or "output"
    instruction = column_of(columns, prompt_key, "data.prompt_key")
    more = columns.get("input")
    for name, value in ((prompt_key, instruction), ("input", more)):
        if value is not None and not isinstance(value, str):
            raise BadRow(f"column {name!r} holds {type_name(value)}; wanted a text")
    asked = "\n\n".join(part for part in (instruction, more) if part)
    messages: list[Message] = []
    for turn in columns.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("column 'history' is not a list of [user text, assistant text]")
        messages += prompt_messages(turn[0], "column 'history'")
        messages.append(answer_message(turn[1], "column 'history'"))
    answer = column_of(columns, response_key, "data.response_key")
    return [
        *messages,
        *prompt_messages(asked, f"column {prompt_key!r}"),
        answer_message(answer, f"column {response_key!r}"),
    ]


def _answer_messages(value: Any, where: str) -> list[Message]:
    """An answer may be several messages: tool calls, tool results, and the answer."""
    if isinstance(value, Mapping):
        value = [value]
    found = text_or_messages(value, where)
    return [{"role": "assistant", "content": found}] if isinstance(found, str) else found


def _up_to_last_answer(messages: list[Message], where: str, config: SftDataConfig) -> list[Message]:
    """Drop messages after the last answer, which have no loss tokens; with `learn: all` they are kept."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow(f"{where} has no message of the assistant; there are no loss tokens")
    return messages if config.learn == "all" else messages[: answers[-1] + 1]


def _conditioned(messages: list[Message], columns: Mapping[str, Any], config: SftDataConfig) -> list[Message]:
    """Inserts the reward before the last user message (conditional SFT, arXiv 2308.12050)."""
    if config.reward_key is None or config.reward_template is None:
        return messages
    reward = column_of(columns, config.reward_key, "data.reward_key")
    if isinstance(reward, bool) or not isinstance(reward, int | float | str):
        raise BadRow(f"column {config.reward_key!r} holds {type_name(reward)}; wanted a number or a text")
    if isinstance(reward, float) and not math.isfinite(reward):
        raise BadRow(f"column {config.reward_key!r} holds {reward}; wanted a finite number")
    said = reward if isinstance(reward, str) else f"{reward:g}"
    check_text(said, f"column {config.reward_key!r}")
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    content = prefixed(messages[last]["content"], config.reward_template.replace("{}", said))
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]
