"""Normalises conversations of different data set formats to a list of {role, content} messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.config.data import DataConfig
from rayrlhf.data.rows.flags import FLAGS, is_trained
from rayrlhf.data.rows.images import ImageRef, image_part, is_image_part, text_of, with_images
from rayrlhf.data.rows.json_text import parsed, parsed_or_none
from rayrlhf.data.rows.row import BadRow, check_text, check_unicode, quoted, type_name
from rayrlhf.data.rows.tools import tool_calls_of, tools_from

Message = dict[str, Any]

# Aliases of roles; other roles are kept, for the chat template to accept or reject.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's messages that consist of a call only
TEXT_PARTS = (None, "text", "input_text", "output_text")
# Which roles may follow which; "" is the start of the conversation.
FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def conversation_of(value: Any, where: str) -> list[Message]:
    """A list of {role, content} or of ShareGPT's {from, value}, also as JSON text (as in CSV files).

    Each returned message has a role of ROLES, a text as content, tool calls in one form, and the key
    `weight`, 0, if it is excluded from the loss.
    """
    if isinstance(value, str):
        value = parsed(value, where)
    if not isinstance(value, list):
        raise BadRow(f"{where} holds {type_name(value)}; wanted a list of messages")
    if not value:
        raise BadRow(f"{where} is an empty list of messages")
    numbered = enumerate(value, start=1)
    return [one for number, each in numbered for one in _in_one_form(each, f"message {number} in {where}")]


def text_or_messages(value: Any, where: str) -> str | list[Message]:
    """A text, or messages. A text is read as messages only if it is completely JSON for messages, as in CSV
    files; its beginning alone is not enough.
    """
    if not isinstance(value, str):
        return conversation_of(value, where)
    found = parsed_or_none(value)
    if _is_message(found):
        found = [found]
    if isinstance(found, list) and found and all(map(_is_message, found)):
        return conversation_of(found, where)
    check_text(value, where)
    return value


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    role = value.get("role", value.get("from"))
    said = any(key in value for key in ("content", "value", "tool_calls", "function_call"))
    return isinstance(role, str) and role.lower() in ROLES and said


def _in_one_form(message: Any, where: str) -> Iterator[Message]:
    """The normalised message; several if one of Anthropic's messages has results of several tools."""
    if not isinstance(message, Mapping):
        raise BadRow(f"{where} is {type_name(message)}; wanted {{role, content}}")
    present = {key: item for key, item in message.items() if item is not None}
    role = _role(present, where)
    content = present.get("content", present.get("value"))
    calls = _calls(present, where)
    if content is not None and str(present.get("role", present.get("from"))).lower() in CALL_ROLES:
        content, calls = None, tool_calls_of(content, where)
    if isinstance(content, list):
        uses = [part for part in content if _kind(part) == "tool_use"]
        calls += tool_calls_of(uses, where)
        results = [part for part in content if _kind(part) == "tool_result"]
        yield from (_result(part, where) for part in results)
        content = [part for part in content if _kind(part) not in ("tool_use", "tool_result")]
        if results and not content:
            return
    if content is None and not calls and role != "tool":
        raise BadRow(f"{where} has no content; its keys are: {quoted(present)}")
    if calls and role != "assistant":
        raise BadRow(f"{where} ({role}) has tool calls; wanted them in a message of the assistant")
    taken = (*FLAGS, "role", "from", "content", "value", "tool_calls", "function_call")
    found = {"role": role, **{key: item for key, item in present.items() if key not in taken}}
    text = "" if content is None else _content(content, role, where)
    if text or not calls:  # templates test whether a message with tool calls also has a content
        found["content"] = text
    if calls:
        found["tool_calls"] = calls
    yield found | _weight(present, role, where)


def _role(present: Mapping[str, Any], where: str) -> str:
    role = present.get("role", present.get("from"))
    if not isinstance(role, str) or not role:
        raise BadRow(f"{where} has no role; its keys are: {quoted(present)}")
    check_unicode(role, f"the role of {where}")
    if "role" not in present and role.lower() not in ROLES:
        raise BadRow(f"{where} is a message from {role!r}; known roles: {quoted(ROLES)}")
    return ROLES.get(role.lower(), role)


def _calls(present: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = tool_calls_of(present.get("tool_calls"), where)
    return calls or tool_calls_of(present.get("function_call"), where)  # OpenAI's older form


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _result(part: Mapping[str, Any], where: str) -> Message:
    content = part.get("content")
    found = {"role": "tool", "content": "" if content is None else _text(content, "tool", where)}
    return found | ({"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") is not None else {})


def _content(content: Any, role: str, where: str) -> Any:
    """A text; parts, if some of a user's message are images."""
    if not isinstance(content, list) or not any(map(is_image_part, content)):
        return _text(content, role, where)
    if role != "user":
        raise BadRow(f"{where} ({role}) has images; wanted them in messages of the user")
    return [image_part(part, where) if is_image_part(part) else _text_part(part, where) for part in content]


def _text_part(part: Any, where: str) -> dict[str, Any]:
    return {"type": "text", "text": _text([part], "user", where)}


def _text(content: Any, role: str, where: str) -> str:
    """The text of a content: a text, OpenAI's parts, or a tool's result."""
    if isinstance(content, Mapping) and content.get("type") == "text":
        content = [content]
    if isinstance(content, list) and (role != "tool" or all(_is_text_part(part) for part in content)):
        content = _joined(content, where)
    if role == "tool" and not isinstance(content, str):
        try:
            content = json.dumps(content, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise BadRow(f"the content of {where} cannot be written as JSON: {error}") from error
    if not isinstance(content, str):
        raise BadRow(f"the content of {where} is {type_name(content)}; wanted a text")
    check_unicode(content, where)
    return content


def _is_text_part(part: Any) -> bool:
    if isinstance(part, str):
        return True
    return isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)


def _joined(parts: Sequence[Any], where: str) -> str:
    """The concatenated text of OpenAI's content parts."""
    for part in parts:
        if not _is_text_part(part):
            kind = f"type {_kind(part)!r}" if isinstance(part, Mapping) else type_name(part)
            raise BadRow(f"{where} has content parts that are not text ({kind}); wanted text or images")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def _weight(present: Mapping[str, Any], role: str, where: str) -> Message:
    trained = is_trained(present, where)
    if trained and role != "assistant":
        flag = next(key for key in FLAGS if present.get(key) is not None)
        raise BadRow(
            f"{where} ({role}) has {flag}: {present[flag]!r}, but only assistant turns are trained on; "
            "remove the flag, or set data.learn=all without flags"
        )
    return {} if trained is None or trained or role != "assistant" else {"weight": 0}


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Raises `BadRow` for unknown or out-of-order roles, and for empty turns.

    After an optional system message, user and assistant messages alternate, starting with the user; tool
    messages are between two messages of the assistant.
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
            check_text(text_of(message.get("content", "")), f"message {number} ({role}) in {where}")
        before = role


def prompt_messages(value: Any, where: str) -> list[Message]:
    """Messages of a prompt that is a text or a conversation."""
    found = text_or_messages(value, where)
    return [{"role": "user", "content": found}] if isinstance(found, str) else found


def answer_message(value: Any, where: str) -> Message:
    """The message of an answer that is a text, one message, or a list of one message."""
    found = text_or_messages([value] if isinstance(value, Mapping) else value, where)
    if isinstance(found, str):
        return {"role": "assistant", "content": found}
    if len(found) != 1 or found[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in found)
        raise BadRow(f"{where} holds messages of {roles}; wanted a text or one message of the assistant")
    return found[0]


def check_trained(answer: Message, where: str) -> None:
    """Raises `BadRow` for the answer of a pair, or a judged one, that a flag excludes from the loss."""
    if answer.get("weight") == 0:
        raise BadRow(f"{where} is excluded from the loss (weight: 0 or similar), which leaves no loss tokens")


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as the chat template is to be given them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    images: list[ImageRef] = field(default_factory=list)  # one for each content part {"type": "image"}


def conversation_with(
    messages: list[Message], columns: Mapping[str, Any], config: DataConfig
) -> Conversation:
    """A row's messages with its system prompt and its tools, or the config's: of every kind of row alike, so
    that the same row is rendered the same by SFT, a reward model and a policy run. Raises `BadRow`.
    """
    messages, images = with_images(messages, columns, config)
    return Conversation(_with_system(messages, columns, config), tools_of(columns, config), images)


def _with_system(messages: list[Message], columns: Mapping[str, Any], config: DataConfig) -> list[Message]:
    """Prepends the row's system message, or else the config's, to a conversation without one."""
    key = config.system_key or "system"
    own = columns.get(key)
    if config.system_key is not None and config.system_key not in columns:
        raise BadRow(f"no column {key!r} (data.system_key); the columns are: {quoted(columns)}")
    if isinstance(own, list):
        own = _joined(own, f"column {key!r}")
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


def tools_of(columns: Mapping[str, Any], config: DataConfig) -> list[dict[str, Any]] | None:
    """The row's tool definitions for the chat template, or else the config's."""
    key = config.tools_key or "tools"
    if config.tools_key is not None and key not in columns:
        raise BadRow(f"no column {key!r} (data.tools_key); the columns are: {quoted(columns)}")
    tools = tools_from(columns.get(key), f"column {key!r}")
    if tools and not config.apply_chat_template:
        raise BadRow(f"column {key!r} holds tools, which need data.apply_chat_template=true")
    return tools or tools_from(config.tools, "data.tools")


def transcript_of(text: Any, where: str) -> list[Message]:
    r"""The turns of an Anthropic-HH text, "\n\nHuman: …\n\nAssistant: …"."""
    if not isinstance(text, str):
        raise BadRow(f"{where} holds {type_name(text)}; wanted a text of 'Human:' and 'Assistant:' turns")
    head, *rest = HH_TURN.split(text)
    if head.strip() or not rest:
        raise BadRow(f"{where} does not begin with 'Human:'; wanted turns of 'Human:' and 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(rest[::2], rest[1::2], strict=True)
    return conversation_of([{"role": roles[name], "content": said.strip()} for name, said in turns], where)
