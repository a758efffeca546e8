"""Applies the chat template; probes once in which form it renders tool calls and definitions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from rayrlhf.data.rows.row import BadRow, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# objects: arguments as objects, as Hugging Face documents it. texts: arguments as JSON text and a null
# content, as in OpenAI's API and for DeepSeek's templates. nothing: the template ignores calls.
CallForm = Literal["objects", "texts", "nothing"]
# nested: in OpenAI's envelope, as Hugging Face documents it. flat: without it.
ToolForm = Literal["nested", "flat", "nothing"]
Messages = Sequence[Mapping[str, Any]]

STAND_IN = "the-answer-goes-here"
PROBE: dict[str, Any] = {"role": "user", "content": "probe"}
PROBE_CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "probe0001",  # nine letters or digits, required by Mistral's templates
            "type": "function",
            "function": {"name": "probe_name", "arguments": {"probe_key": "probe_value"}},
        }
    ],
}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_name",
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "probe"}},
            "required": ["probe_key"],
        },
    },
}


def apply_template(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text of a conversation, ending with the generation prompt with `add_generation_prompt`.

    Raises `BadRow` if the template rejects the conversation or ignores its tool calls, and `DataError` if
    there is no template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"data.apply_chat_template is true, but the tokenizer {tokenizer.name_or_path} has no template; "
            "set one with data.chat_template, or set data.apply_chat_template=false"
        )
    if any(message.get("tool_calls") for message in messages):
        form = call_form(tokenizer, _source(tokenizer))
        if form == "nothing":
            raise BadRow(
                "it has tool calls, which the chat template does not render; "
                "set a template that does with data.chat_template"
            )
        if form == "texts":
            messages = [_with_texts(message) for message in messages]
    if tools and tool_form(tokenizer) == "flat":
        tools = [tool.get("function", tool) for tool in tools]
    return _rendered(messages, tokenizer, tools, add_generation_prompt)


def tool_form(tokenizer: PreTrainedTokenizerBase) -> ToolForm:
    """The form of tool definitions that the template renders."""
    return _tool_form(tokenizer, _source(tokenizer))


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text, used as cache key; the one for tools if there is one."""
    template: Any = tokenizer.chat_template
    return json.dumps(template, sort_keys=True)


def _rendered(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # template code may raise anything; `raise_exception` rejects this row
        raise BadRow(f"the chat template rejects it: {error}") from error
    assert isinstance(text, str)
    return text


def _with_texts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {
        "content": None,
        **message,
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in calls
        ],
    }


def _json(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


@lru_cache(maxsize=8)
def call_form(tokenizer: PreTrainedTokenizerBase, source: str) -> CallForm:
    """The form in which the template renders a call: its output contains name, argument and value, as JSON or
    in a custom syntax, neither escaped twice nor as Python's repr.

    If it rejects all forms, rows are rendered in Hugging Face's form, and report why they fail.
    """
    rejected = True
    answered = {"role": "tool", "tool_call_id": "probe0001", "name": "probe_name", "content": "probe"}
    forms: tuple[tuple[CallForm, Mapping[str, Any]], ...] = (
        ("objects", PROBE_CALL),
        ("texts", _with_texts(PROBE_CALL)),
    )
    for form, call in forms:
        for tools in ([PROBE_TOOL], None):
            try:
                without = _rendered([PROBE], tokenizer, tools, False)
                text = _rendered([PROBE, call, answered], tokenizer, tools, False)
            except BadRow:
                continue
            rejected = False
            if _shows_call(text.removeprefix(without)):
                return form
    return "objects" if rejected else "nothing"


def _shows_call(text: str) -> bool:
    shown = all(part in text for part in ("probe_name", "probe_key", "probe_value"))
    return shown and "'probe_key'" not in text and '\\"probe_key' not in text


@lru_cache(maxsize=8)
def _tool_form(tokenizer: PreTrainedTokenizerBase, source: str) -> ToolForm:
    rejected = False
    forms: tuple[tuple[ToolForm, Any], ...] = (("nested", PROBE_TOOL), ("flat", PROBE_TOOL["function"]))
    for form, tool in forms:
        try:
            if "probe_name" in _rendered([PROBE], tokenizer, [tool], True):
                return form
        except BadRow:
            rejected = True
    return "nested" if rejected else "nothing"  # rendering a row will report the error
