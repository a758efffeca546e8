"""Raw rows of data files, their checks, and error messages that say how to fix the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

MAX_SHOWN = 5  # problems listed individually in a message; the rest is a count


class DataError(ValueError):
    """The data cannot be used. The message names the file, the row, the problem and the fix."""


class BadRow(ValueError):
    """One row cannot be used. The message says why and what was wanted; the caller adds file and row."""


@dataclass(frozen=True)
class RawRow:
    """A row as read from its file."""

    file: str
    row: int  # 1-based: the line in text files, the item or row in the others
    columns: dict[str, Any]  # empty if the row could not be read
    problem: str = ""  # why it could not be read
    padded: tuple[str, ...] = ()  # columns with nulls as padding: see `data.rows.padding`
    left_out: tuple[str, ...] = ()  # columns that were not read, such as "'image' (an image)"

    @property
    def place(self) -> str:
        return f"{self.file}:{self.row}"


def column_of(columns: Mapping[str, Any], key: str, key_path: str) -> Any:
    """The value of a column. Raises `BadRow` if the column is missing."""
    if key not in columns:
        raise BadRow(f"no column {key!r} ({key_path}); the columns are: {quoted(columns)}")
    return columns[key]


def check_text(text: str, where: str) -> None:
    """Raises `BadRow` for a blank text, and for one that is not valid Unicode."""
    if not text.strip():
        raise BadRow(f"{where} is empty")
    check_unicode(text, where)


def check_unicode(text: str, where: str) -> None:
    """Raises `BadRow` for invalid Unicode, which neither tokenizers nor files accept."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can write as \ud800
        raise BadRow(
            f"{where} is not valid Unicode text (character {error.start + 1} is a lone surrogate)"
        ) from error


def quoted(names: Iterable[str]) -> str:
    """Names as a list for messages."""
    return ", ".join(map(repr, names)) or "none"  # repr shows stray blanks and escapes unprintable characters


def type_name(value: Any) -> str:
    """The type of a value, for messages."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a boolean", str: "a text"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def columns_to_json(columns: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The columns as one JSON object, since rows of one file need not share a schema.

    Also returns the dropped columns, which JSON cannot represent (such as image bytes), each with the reason.
    """
    try:
        return json.dumps(columns, default=_plain), []
    except (TypeError, ValueError, RecursionError):
        pass  # find the column below
    kept, left_out = {}, []
    for name, value in columns.items():
        try:
            json.dumps(value, default=_plain)
            kept[name] = value
        except (TypeError, ValueError, RecursionError) as error:
            left_out.append(f"{name!r} ({error})")
    return json.dumps(kept, default=_plain), left_out


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError("bytes" if isinstance(value, bytes) else f"a value of type {type(value).__name__}")


def describe_bad_rows(problems: Sequence[str], total: int | None = None) -> str:
    """A message for bad rows, each given as `file:row: problem`. `total`: if more were counted."""
    total = len(problems) if total is None else total
    lines = [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more")
    return "\n".join(lines)
