"""One row of a data file: what makes it unusable, said so that a person can mend the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

MAX_SHOWN = 5  # problems listed one by one in a message; the rest is a count


class DataError(ValueError):
    """The data cannot be used. The message names the file, the row, what is wrong and what would mend it."""


class BadRow(ValueError):
    """One row cannot be used. The message says why and what was wanted; who catches it adds file and row."""


@dataclass(frozen=True)
class RawRow:
    """A row as its file holds it."""

    file: str
    row: int  # 1-based: the line in text files, the item or row in the others
    columns: dict[str, Any]  # empty when the row could not be read
    problem: str = ""  # why it could not be read

    @property
    def place(self) -> str:
        return f"{self.file}:{self.row}"


def prompt_of(
    columns: Mapping[str, Any], prompt_key: str, label_key: str | None = None
) -> str | list[dict[str, Any]]:
    """The row's prompt: a text, or a conversation that ends where the model is to speak.

    Raises `BadRow` for a column that is missing, a prompt that is neither text nor messages, an empty one, a
    message without role or content, a conversation that already ends with an answer, and text that is not
    Unicode.
    """
    prompt = column_of(columns, prompt_key, "data.prompt_key")
    if label_key is not None and column_of(columns, label_key, "data.label_key") is None:
        raise BadRow(f"the label column {label_key!r} is null")
    if isinstance(prompt, str):
        check_text(prompt, f"column {prompt_key!r}")
        return prompt
    if not isinstance(prompt, list):
        raise BadRow(
            f"column {prompt_key!r} holds {type_name(prompt)}; "
            "wanted a text or a list of {role, content} messages"
        )
    messages = messages_of(prompt, f"column {prompt_key!r}")
    last = messages[-1]
    if last["role"] == "assistant":
        raise BadRow(
            f"the messages in column {prompt_key!r} end with the assistant's answer; "
            "a prompt ends where the model is to speak, so leave the answer out"
        )
    check_text(last.get("content", ""), f"the last message in column {prompt_key!r}")
    return messages


def column_of(columns: Mapping[str, Any], key: str, key_path: str) -> Any:
    """The value of a column. Raises `BadRow` where there is none."""
    if key not in columns:
        raise BadRow(f"no column {key!r} ({key_path}); the columns are: {quoted(columns)}")
    return columns[key]


def messages_of(messages: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Messages, each with a role and a content that is text (or tool calls). Raises `BadRow` for others."""
    if not messages:
        raise BadRow(f"{where} is an empty list of messages")
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        place = f"message {number} in {where}"
        if not isinstance(message, Mapping):
            raise BadRow(f"{place} is {type_name(message)}; wanted {{role, content}}")
        # Arrow gives every struct the keys of all others, as nulls, and templates ask "is the key there?".
        present = {key: value for key, value in message.items() if value is not None}
        if not isinstance(present.get("role"), str) or not present["role"]:
            raise BadRow(f"{place} has no role; its keys are: {quoted(present)}")
        if "content" not in present and "tool_calls" not in present:
            raise BadRow(f"{place} has no content; its keys are: {quoted(present)}")
        content = present.get("content", "")
        if not isinstance(content, str):
            raise BadRow(f"the content of {place} is {type_name(content)}; wanted a text")
        check_unicode(content, place)
        checked.append(present)
    return checked


def check_text(text: str, where: str) -> None:
    """Raises `BadRow` for a text of nothing but blanks, and for one that is not Unicode."""
    if not text.strip():
        raise BadRow(f"{where} is empty")
    check_unicode(text, where)


def check_unicode(text: str, where: str) -> None:
    """Raises `BadRow` for a text that no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell as \ud800
        raise BadRow(
            f"{where} is not valid Unicode text (character {error.start + 1} is half a pair)"
        ) from error


def quoted(names: Iterable[str]) -> str:
    """Names in a list for people."""
    return ", ".join(map(repr, names)) or "none"  # quotes show a stray blank, and escapes what is unprintable


def type_name(value: Any) -> str:
    """What a value is, for people."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a boolean", str: "a text"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def columns_to_json(columns: Mapping[str, Any]) -> str:
    """All columns as one JSON object, in which form a row travels: rows of one file need not share a schema.

    Raises `BadRow` for a column that JSON cannot hold, such as the bytes of an image.
    """
    for name, value in columns.items():
        if isinstance(value, bytes):
            raise BadRow(f"column {name!r} holds bytes; wanted text, numbers, lists or objects")
    try:
        return json.dumps(columns, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"its columns cannot be kept as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def describe_bad_rows(problems: Sequence[str], total: int | None = None) -> str:
    """A message for bad rows, each given as `file:row: what is wrong`. `total` where more were counted."""
    total = len(problems) if total is None else total
    lines = [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more")
    return "\n".join(lines)
