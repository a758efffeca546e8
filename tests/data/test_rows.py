import json
from datetime import date

import pytest

from rayrlhf.data.rows import BadRow, columns_to_json, describe_bad_rows, prompt_of

USER = {"role": "user", "content": "hello"}


def test_a_text_and_a_conversation_are_prompts():
    assert prompt_of({"q": "hello"}, "q") == "hello"
    conversation = [{"role": "system", "content": "be brief"}, USER]
    assert prompt_of({"q": conversation}, "q") == conversation


def test_nulls_that_arrow_adds_to_messages_are_dropped():
    assert prompt_of({"q": [{**USER, "tool_calls": None, "name": None}]}, "q") == [USER]


def test_an_assistant_turn_that_only_calls_a_tool_needs_no_content():
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    conversation = [USER, call, {"role": "tool", "content": "3"}]
    assert prompt_of({"q": conversation}, "q") == conversation


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"question": "a", "answer": "b"}, r"no column 'q' .*the columns are: 'question', 'answer'"),
        ({}, "the columns are: none"),
        ({"q": None}, "holds null; wanted a text or a list"),
        ({"q": 3}, "holds a value of type int"),
        ({"q": True}, "holds a boolean"),
        ({"q": {"role": "user"}}, "holds an object"),
        ({"q": ""}, "column 'q' is empty"),
        ({"q": " \n\t"}, "column 'q' is empty"),
        ({"q": "\ud83d alone"}, r"not valid Unicode text \(character 1 "),
        ({"q": []}, "empty list of messages"),
        ({"q": ["hello"]}, "message 1 .* is a text; wanted"),
        ({"q": [USER, {"content": "x"}]}, "message 2 .* has no role; its keys are: 'content'"),
        ({"q": [{"role": "", "content": "x"}]}, "has no role"),
        ({"q": [{"role": "user"}]}, "message 1 .* has no content; its keys are: 'role'"),
        ({"q": [{"role": "user", "content": None}]}, "has no content"),
        (
            {"q": [{"role": "user", "content": [{"type": "text"}]}]},
            "content of message 1 .* is a list; wanted a text",
        ),
        ({"q": [USER, {"role": "assistant", "content": "hi"}]}, "end with the assistant's answer"),
        ({"q": [{"role": "user", "content": " "}]}, "the last message .* is empty"),
    ],
)
def test_what_cannot_be_a_prompt(columns, reason):
    with pytest.raises(BadRow, match=reason):
        prompt_of(columns, "q")


def test_the_label_column_must_be_there_and_filled():
    assert prompt_of({"q": "a", "answer": 0}, "q", "answer") == "a"
    with pytest.raises(BadRow, match=r"no column 'answer' \(data.label_key\); the columns are: 'q'"):
        prompt_of({"q": "a"}, "q", "answer")
    with pytest.raises(BadRow, match="label column 'answer' is null"):
        prompt_of({"q": "a", "answer": None}, "q", "answer")


def test_columns_travel_as_json():
    text = columns_to_json({"q": "é", "n": 2**70, "day": date(2024, 2, 29), "none": None})
    assert json.loads(text) == {"q": "é", "n": 2**70, "day": "2024-02-29", "none": None}


@pytest.mark.parametrize("value", [b"\x89PNG", [b"x"], object()])
def test_columns_that_json_cannot_hold_are_bad(value):
    with pytest.raises(BadRow):
        columns_to_json({"image": value})


def test_only_the_first_problems_are_listed():
    described = describe_bad_rows([f"f:{n}: bad" for n in range(1, 8)])
    assert described.splitlines() == [*(f"  f:{n}: bad" for n in range(1, 6)), "  … and 2 more"]
    assert describe_bad_rows(["f:1: bad"], total=1) == "  f:1: bad"
