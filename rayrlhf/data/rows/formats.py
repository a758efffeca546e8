"""From a raw row of any known shape to the one form that its kind of example has. No tokenizer here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.config.examples import (
    ExampleDataConfig,
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)
from rayrlhf.data.rows.conversations import Conversation, Text, conversation_or_text
from rayrlhf.data.rows.preferences import Judged, Pair, judged_of, pair_of
from rayrlhf.data.rows.row import BadRow, column_of
from rayrlhf.data.rows.steps import Steps, steps_of

NormalForm = Conversation | Text | Pair | Judged | Steps


def normal_form(columns: Mapping[str, Any], config: ExampleDataConfig) -> NormalForm:
    """The example in a row, as its config says to read it. Raises `BadRow` for a row that holds none."""
    if isinstance(config, SftDataConfig):
        return conversation_or_text(columns, config)
    if isinstance(config, PairDataConfig):
        return pair_of(columns, config)
    if isinstance(config, KtoDataConfig):
        return judged_of(columns, config)
    if isinstance(config, PrmDataConfig):
        return steps_of(columns, config)
    raise TypeError(f"no kind of example has a {type(config).__name__}")


def id_of(columns: Mapping[str, Any], config: ExampleDataConfig) -> str:
    """What tells the row apart from others; empty where nothing is compared."""
    if config.id_key is None:
        return ""
    value = column_of(columns, config.id_key, "data.id_key")
    if value is None or value == "" or isinstance(value, dict | list):
        raise BadRow(f"the id column {config.id_key!r} holds {value!r}; wanted a text or a number")
    return repr(value)
