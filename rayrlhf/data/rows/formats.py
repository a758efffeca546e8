"""Converts a raw row of any known format to the normal form of its task. No tokenizer here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.config.example_data import (
    ExampleDataConfig,
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)
from rayrlhf.data.rows.conversations import Text, conversation_or_text
from rayrlhf.data.rows.messages import Conversation
from rayrlhf.data.rows.preferences import Judged, Pair, judged_of, pair_of
from rayrlhf.data.rows.row import BadRow, column_of
from rayrlhf.data.rows.steps import Steps, steps_of

NormalForm = Conversation | Text | Pair | Judged | Steps


def normal_form(columns: Mapping[str, Any], config: ExampleDataConfig) -> NormalForm:
    """The example in a row, by the config's format. Raises `BadRow` for a row without one."""
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
    """The row's id, for duplicate detection; empty if duplicates are not checked."""
    if config.id_key is None:
        return ""
    value = column_of(columns, config.id_key, "data.id_key")
    if value is None or value == "" or isinstance(value, dict | list):
        raise BadRow(f"the id column {config.id_key!r} holds {value!r}; wanted a text or a number")
    return repr(value)
