"""What makes a row unusable."""

from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.rows import prompt_rows
from rayrlhf.data.rows.messages import Conversation
from rayrlhf.data.rows.row import BadRow, columns_to_json, describe_bad_rows

USER = {"role": "user", "content": "hi"}


def prompt_of(columns: dict[str, Any], prompt_key: str, label_key: str | None = None) -> Any:
    keys = {"prompt_key": prompt_key, "label_key": label_key}
    found = prompt_rows.prompt_of(columns, PromptDataConfig.model_validate({"train": "a.jsonl", **keys}))
    assert isinstance(found, Conversation)
    return found.messages


def test_a_text_or_messages() -> None:
    assert prompt_of({"q": " hi ", "other": 1}, "q") == [{"role": "user", "content": " hi "}]
    assert prompt_of({"prompt": [{"role": "system", "content": ""}, USER]}, "prompt") == [
        {"role": "system", "content": ""},
        USER,
    ]


def test_null_keys_that_arrow_adds_to_messages_are_left_out() -> None:
    assert prompt_of({"prompt": [{**USER, "tool_calls": None}]}, "prompt") == [USER]


def test_an_assistant_turn_that_only_calls_a_tool_needs_no_content() -> None:
    answer = {"role": "tool", "content": "3"}
    found = prompt_of(
        {"prompt": [USER, {"role": "assistant", "tool_calls": [{"name": "add"}]}, answer]}, "prompt"
    )
    add = {"type": "function", "function": {"name": "add", "arguments": {}}}
    assert found == [USER, {"role": "assistant", "tool_calls": [add]}, answer]


@pytest.mark.parametrize(
    "columns, problem",
    [
        ({"question": "a", "answer ": "b"}, "no column 'prompt' .* are: 'question', 'answer '"),
        ({}, "no column 'prompt' .* are: none"),
        ({"prompt": None}, "holds null; wanted a text or a list"),
        ({"prompt": 3}, "holds a value of type int"),
        ({"prompt": {"role": "user"}}, "holds an object"),
        ({"prompt": " \n"}, "column 'prompt' is empty"),
        ({"prompt": "half \ud83d"}, "not valid Unicode text .character 6"),
        ({"prompt": []}, "empty list of messages"),
        ({"prompt": [USER, "hi"]}, "message 2 in column 'prompt' is a text"),
        ({"prompt": [{"content": "hi"}]}, "message 1 .* has no role; its keys are: 'content'"),
        ({"prompt": True}, "holds a boolean"),
        ({"prompt": [{"role": "", "content": "hi"}]}, "has no role"),
        ({"prompt": [{"role": "user", "content": None}]}, "has no content"),
        ({"prompt": [{"role": "user"}]}, "message 1 .* has no content; its keys are: 'role'"),
        ({"prompt": [{"role": "user", "content": [3]}]}, "message 1 .* content parts that are not text"),
        ({"prompt": [{"role": "user", "content": " "}]}, "last message in column 'prompt' is empty"),
        ({"prompt": [USER, {"role": "assistant", "content": "a"}]}, "end with the assistant's answer"),
    ],
)
def test_bad_prompts(columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        prompt_of(columns, "prompt")


@pytest.mark.parametrize(
    "columns, problem",
    [({"prompt": "a"}, r"no column 'label' \(data.label_key\)"), ({"prompt": "a", "label": None}, "is null")],
)
def test_bad_labels(columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        prompt_of(columns, "prompt", "label")


def test_columns_travel_as_json() -> None:
    columns = {"a": 1, "b": ["ü", None], "day": date(2024, 2, 29), "price": Decimal("1.10")}
    written = '{"a": 1, "b": ["\\u00fc", null], "day": "2024-02-29", "price": "1.10"}'
    assert columns_to_json(columns) == (written, [])


@pytest.mark.parametrize(
    "value, why",
    [
        (b"\x00", "'a' (bytes)"),
        ({"bytes": b"\x00", "path": None}, "'a' (bytes)"),
        ([{"image": [b"\x00"]}], "'a' (bytes)"),
        (object(), "'a' (a value of type object)"),
        (timedelta(1), "'a' (a value of type timedelta)"),
        ({1}, "'a' (a value of type set)"),
        (1j, "'a' (a value of type complex)"),
        (Path("x"), "'a' (a value of type PosixPath)"),
        ({(1,): 2}, "'a' (keys must be str, int, float, bool or None, not tuple)"),
    ],
)
def test_19_columns_that_json_cannot_hold_are_left_out(value: Any, why: str) -> None:
    assert columns_to_json({"a": value, "prompt": "hi"}) == ('{"prompt": "hi"}', [why])


def test_only_the_first_problems_are_listed() -> None:
    assert describe_bad_rows(["f:1: x"]) == "  f:1: x"
    described = describe_bad_rows([f"f:{n}: x" for n in range(1, 6)], total=12).splitlines()
    assert described[0] == "  f:1: x" and described[4:] == ["  f:5: x", "  … and 7 more"]
