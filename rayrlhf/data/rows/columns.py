"""Recognising the shape of a row by its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.data.rows.row import BadRow, quoted

PROMPT_NAMES = ("prompt", "question", "instruction", "query")
RESPONSE_NAMES = ("response", "completion", "answer", "output")
MESSAGES_NAMES = ("messages", "conversations")


def pick(columns: Mapping[str, Any], key: str | None, names: Sequence[str]) -> str | None:
    """The column that the config names, or else the first of the usual names; None where there is none."""
    if key is not None:
        return key if key in columns else None
    return next((name for name in names if columns.get(name) is not None), None)


def pick_or_fail(columns: Mapping[str, Any], key: str | None, names: Sequence[str], key_path: str) -> str:
    found = pick(columns, key, names)
    if found is not None:
        return found
    missing = repr(key) if key is not None else " or ".join(map(repr, names))
    raise BadRow(f"no column {missing} ({key_path}); the columns are: {quoted(columns)}")


@dataclass(frozen=True)
class Shape:
    """A shape that a row may have: whether it does, and which columns that takes."""

    name: str  # the value of data.format
    columns: str  # for messages
    fits: bool
    asked_for: bool = False  # a key of the config names one of its columns


def recognise(columns: Mapping[str, Any], shapes: Sequence[Shape]) -> str:
    """The one shape that a row has; those whose columns the config names come before all others.

    Raises `BadRow`, with the columns and what was tried, where none or several fit.
    """
    tried = [shape for shape in shapes if shape.asked_for] or list(shapes)
    fitting = [shape for shape in tried if shape.fits]
    if len(fitting) == 1:
        return fitting[0].name
    if not fitting:
        wanted = "; ".join(f"{shape.name} ({shape.columns})" for shape in tried)
        raise BadRow(
            f"its columns {quoted(columns)} fit no format; tried: {wanted}; see data.format and the keys"
        )
    names = [shape.name for shape in fitting]
    raise BadRow(
        f"its columns {quoted(columns)} fit several formats: {', '.join(names)}; "
        f"say which, as in data.format={names[0]}"
    )
