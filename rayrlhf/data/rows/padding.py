"""Removes nulls that a columnar file adds where a row has no value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def without_padding(columns: Mapping[str, Any], padded: Collection[str]) -> dict[str, Any]:
    """The columns of a row; in those of `padded`, objects keep only their own keys.

    Arrow has one type per column: all objects at a position have the union of their keys, and a key that an
    object lacks is null. A null in the original row looks the same, so objects whose nulls are meaningful
    should be stored as JSON text. Columns, and nulls in lists, are never padding and are kept.

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
