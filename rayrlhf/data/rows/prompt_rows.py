"""Prompt rows for PPO, GRPO, `generate` and evaluations, parsed like the rows of all other jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.rows.images import text_of
from rayrlhf.data.rows.messages import (
    Conversation,
    conversation_with,
    prompt_messages,
    text_or_messages,
    tools_of,
)
from rayrlhf.data.rows.row import BadRow, check_text, column_of, type_name


def prompt_columns(config: PromptDataConfig) -> tuple[str, ...]:
    """The columns that form a prompt, if a row has them."""
    return config.prompt_key, config.system_key or "system", config.tools_key or "tools"


def prompt_of(columns: Mapping[str, Any], config: PromptDataConfig) -> Conversation | str:
    """The row's prompt; a text if `apply_chat_template` is false.

    Raises `BadRow` for a missing column, a prompt that is neither text nor messages, an empty one, a message
    without role or content, a conversation that already ends with an answer, text that is not Unicode, and
    for a system message or tools without a chat template to render them.
    """
    key = config.prompt_key
    where = f"column {key!r}"
    prompt = column_of(columns, key, "data.prompt_key")
    if config.label_key is not None and column_of(columns, config.label_key, "data.label_key") is None:
        raise BadRow(f"the label column {config.label_key!r} is null")
    if not isinstance(prompt, str | list):
        raise BadRow(
            f"{where} holds {type_name(prompt)}; wanted a text or a list of {{role, content}} messages"
        )
    if not config.apply_chat_template:
        return _text(prompt, columns, config, where)
    messages = prompt_messages(prompt, where)
    last = messages[-1]
    if last["role"] == "assistant":
        raise BadRow(
            f"the messages in {where} end with the assistant's answer; "
            "a prompt must end before the assistant's turn, so remove the answer"
        )
    if last["role"] != "tool":  # a tool's result may be empty
        check_text(text_of(last.get("content", "")), f"the last message in {where}")
    return conversation_with(messages, columns, config)


def _text(prompt: Any, columns: Mapping[str, Any], config: PromptDataConfig, where: str) -> str:
    found = text_or_messages(prompt, where)
    if not isinstance(found, str):
        raise BadRow(
            f"{where} holds messages, but data.apply_chat_template is false; "
            "wanted a text, or data.apply_chat_template=true"
        )
    key = config.system_key or "system"
    if columns.get(key):
        raise BadRow(f"column {key!r} holds a system message, which needs data.apply_chat_template=true")
    tools_of(columns, config)  # raises for tools without a chat template
    return found
