"""Conversations as data sets write them, brought into one form: {role, content} messages in order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.config.examples import ExampleDataConfig
from rayrlhf.data.rows import BadRow, check_text, messages_of, quoted, type_name

Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# Which roles may come after which; "" stands before the first message.
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def conversation_of(value: Any, where: str) -> list[Message]:
    """A list of {role, content} or of ShareGPT's {from, value}, also as JSON text (which CSV files hold)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, where)
    if not isinstance(value, list):
        raise BadRow(f"{where} holds {type_name(value)}; wanted a list of messages")
    return messages_of([_in_one_form(message, where) for message in value], where)


def _in_one_form(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message  # `messages_of` says what is wrong with it
    if "role" not in message and "from" in message:
        role = SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise BadRow(
                f"{where} has a message from {message['from']!r}; known are: {quoted(SHAREGPT_ROLES)}"
            )
        return {"role": role, "content": message.get("value")}
    if isinstance(content := message.get("content"), list):
        return {**message, "content": _joined(content, where)}
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {**message, "role": role}


def _joined(parts: Sequence[Any], where: str) -> str:
    """The text of OpenAI's content parts."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{where} has content parts that are not text; wanted text only")
    return "".join(map(str, texts))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where} begins like a JSON list, but is not valid JSON ({error})") from error


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Raises `BadRow` for roles that are unknown or out of order, and for turns that say nothing.

    After an optional system message the user begins, user and assistant take turns, and tools answer between
    two messages of the assistant.
    """
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in FOLLOWERS:
            raise BadRow(
                f"message {number} in {where} has the role {role!r}; wanted system, user, assistant or tool"
            )
        if role not in FOLLOWERS[before]:
            seen = "two system messages" if role == before == "system" else f"the role {role!r}"
            place = f"after {before!r}" if before else "at the beginning"
            raise BadRow(
                f"message {number} in {where}: {seen} {place}; wanted {' or '.join(FOLLOWERS[before])}"
            )
        if role == "user" or (role == "assistant" and not message.get("tool_calls")):
            check_text(message.get("content", ""), f"message {number} ({role}) in {where}")
        before = role


def prompt_messages(value: Any, where: str) -> list[Message]:
    """A prompt that is a text or a conversation, as messages."""
    if isinstance(value, str):
        check_text(value, where)
        return [{"role": "user", "content": value}]
    return conversation_of(value, where)


def answer_message(value: Any, where: str) -> Message:
    """An answer that is a text, one message, or a list of one message."""
    if isinstance(value, str):
        check_text(value, where)
        return {"role": "assistant", "content": value}
    messages = conversation_of([value] if isinstance(value, Mapping) else value, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow(f"{where} holds messages of {roles}; wanted a text or one message of the assistant")
    return messages[0]


def with_system(
    messages: list[Message], columns: Mapping[str, Any], config: ExampleDataConfig
) -> list[Message]:
    """Puts the row's system message before a conversation, or else the config's, where it has none."""
    key = config.system_key or "system"
    own = columns.get(key)
    if config.system_key is not None and config.system_key not in columns:
        raise BadRow(f"no column {key!r} (data.system_key); the columns are: {quoted(columns)}")
    if own is not None and not isinstance(own, str):
        raise BadRow(f"column {key!r} (system message) holds {type_name(own)}; wanted a text")
    has_one = messages[0]["role"] == "system"
    if own and has_one and messages[0].get("content") != own:
        raise BadRow(f"two system messages: column {key!r}, and the first message of the conversation")
    content = own or config.system_prompt
    if has_one or not content:
        return messages
    check_text(content, f"column {key!r}")
    return [{"role": "system", "content": content}, *messages]


def tools_of(columns: Mapping[str, Any], config: ExampleDataConfig) -> list[dict[str, Any]] | None:
    """The row's tool definitions for the chat template: a list of objects, also as JSON text."""
    key = config.tools_key or "tools"
    if config.tools_key is not None and key not in columns:
        raise BadRow(f"no column {key!r} (data.tools_key); the columns are: {quoted(columns)}")
    tools = columns.get(key)
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, f"column {key!r}")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"column {key!r} holds {type_name(tools)}; wanted a list of tool definitions (objects)")
    if not config.apply_chat_template:
        raise BadRow(f"column {key!r} holds tools, but data.apply_chat_template is false: nothing shows them")
    return tools


def transcript_of(text: Any, where: str) -> list[Message]:
    r"""The turns of an Anthropic-HH text, "\n\nHuman: …\n\nAssistant: …"."""
    if not isinstance(text, str):
        raise BadRow(f"{where} holds {type_name(text)}; wanted a text of 'Human:' and 'Assistant:' turns")
    head, *rest = HH_TURN.split(text)
    if head.strip() or not rest:
        raise BadRow(f"{where} does not begin with 'Human:'; wanted turns of 'Human:' and 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(rest[::2], rest[1::2], strict=True)
    return messages_of([{"role": roles[name], "content": said.strip()} for name, said in turns], where)
