"""Detects the format of a row by its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.data.rows.row import BadRow, quoted

PROMPT_NAMES = ("prompt", "question", "instruction", "query")
RESPONSE_NAMES = ("response", "completion", "answer", "output")
MESSAGES_NAMES = ("messages", "conversations")


def pick(columns: Mapping[str, Any], key: str | None, names: Sequence[str]) -> str | None:
    """The column that the config names, else the first existing one of the default names; None if none."""
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
    """A candidate format of a row: whether it matches, and the columns it needs."""

    name: str  # the value of data.format
    columns: str  # description for messages
    fits: bool
    asked_for: bool = False  # a key of the config names one of its columns


def recognise(columns: Mapping[str, Any], shapes: Sequence[Shape]) -> str:
    """The only matching format; formats whose columns the config names take precedence.

    Raises `BadRow`, with the columns and the candidates, if none or several match.
    """
    tried = [shape for shape in shapes if shape.asked_for] or list(shapes)
    fitting = [shape for shape in tried if shape.fits]
    if len(fitting) == 1:
        return fitting[0].name
    if not fitting:
        wanted = "; ".join(f"{shape.name} ({shape.columns})" for shape in tried)
        raise BadRow(
            f"its columns {quoted(columns)} match no format; tried: {wanted}; see data.format and the keys"
        )
    names = [shape.name for shape in fitting]
    raise BadRow(
        f"its columns {quoted(columns)} match several formats: {', '.join(names)}; "
        f"select one, as in data.format={names[0]}"
    )
