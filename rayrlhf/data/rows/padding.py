"""Nulls that a columnar file puts where a row has nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def without_padding(columns: Mapping[str, Any], padded: Collection[str]) -> dict[str, Any]:
    """The columns of a row, in those of `padded` each object with its own keys only.

    Arrow has one type per column: all objects at a place share the keys of all of them, and a key that an
    object lacks is null in it. A null that a row had itself looks the same, so that JSON text is the form for
    objects whose nulls mean something. Columns, and nulls in lists, are never padding and stay.

    >>> without_padding({"tools": [{"name": "add", "city": None}], "label": None}, ["tools", "label"])
    {'tools': [{'name': 'add'}], 'label': None}
    """
    return {name: _unpadded(value) if name in padded else value for name, value in columns.items()}


def _unpadded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_unpadded(item) for item in value]
    return value
