"""Parses JSON text in a column or field."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from rayrlhf.data.rows.row import BadRow


def parsed(text: str, where: str) -> Any:
    """The value of a text that must be JSON. Raises `BadRow` if it is not."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where} is a text that is not valid JSON ({error})") from error


def parsed_or_none(text: str) -> Any:
    """The value of a text that may be JSON; None if it is not."""
    if not text.lstrip().startswith(("[", "{")):  # only lists and objects are of interest
        return None
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
