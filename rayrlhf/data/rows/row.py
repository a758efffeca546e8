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
    padded: tuple[str, ...] = ()  # columns with nulls as padding: see `data.rows.padding`
    left_out: tuple[str, ...] = ()  # columns that were not read, such as "'image' (an image)"

    @property
    def place(self) -> str:
        return f"{self.file}:{self.row}"


def column_of(columns: Mapping[str, Any], key: str, key_path: str) -> Any:
    """The value of a column. Raises `BadRow` where there is none."""
    if key not in columns:
        raise BadRow(f"no column {key!r} ({key_path}); the columns are: {quoted(columns)}")
    return columns[key]


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


def columns_to_json(columns: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The columns as one JSON object, in which form a row travels: rows of one file need not share a schema.

    Also those that JSON cannot hold, such as the bytes of an image, each with the reason: they are left out.
    """
    try:
        return json.dumps(columns, default=_plain), []
    except (TypeError, ValueError, RecursionError):
        pass  # a column is the reason: which is found below
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
    """A message for bad rows, each given as `file:row: what is wrong`. `total` where more were counted."""
    total = len(problems) if total is None else total
    lines = [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more")
    return "\n".join(lines)
