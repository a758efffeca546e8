"""Rows of every known shape come to one form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayrlhf.config.example_data import KtoDataConfig, PairDataConfig, PrmDataConfig, SftDataConfig
from rayrlhf.data.rows.conversations import Text
from rayrlhf.data.rows.formats import id_of, normal_form
from rayrlhf.data.rows.messages import Conversation
from rayrlhf.data.rows.preferences import Judged, Pair
from rayrlhf.data.rows.row import BadRow
from rayrlhf.data.rows.steps import Steps

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "be"}
SYSTEM = {"role": "system", "content": "short"}


def sft(row: dict[str, Any], **fields: Any) -> Any:
    return normal_form(row, SftDataConfig.model_validate({"train": "a.jsonl", **fields}))


def pair(row: dict[str, Any], **fields: Any) -> Any:
    return normal_form(row, PairDataConfig.model_validate({"train": "a.jsonl", **fields}))


def judged(row: dict[str, Any], **fields: Any) -> Any:
    return normal_form(row, KtoDataConfig.model_validate({"train": "a.jsonl", **fields}))


def steps(row: dict[str, Any], **fields: Any) -> Any:
    config = PrmDataConfig.model_validate({"train": "a.jsonl", "step_token": "<step>", **fields})
    return normal_form(row, config)


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        ({"messages": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),  # as a CSV file holds them
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "be"}]},
            [USER, ASSISTANT],
        ),
        (
            {
                "system": "short",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "be"}],
            },
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"instruction": "hi", "input": "", "output": "be"}, [USER, ASSISTANT]),
        ({"instruction": "a", "input": "b", "output": "be"}, [{**USER, "content": "a\n\nb"}, ASSISTANT]),
        (
            {"instruction": "hi", "output": "be", "history": [["hi", "be"]]},
            [USER, ASSISTANT, USER, ASSISTANT],
        ),
        ({"prompt": "hi", "response": "be"}, [USER, ASSISTANT]),
        ({"question": "hi", "answer": "be", "difficulty": 3}, [USER, ASSISTANT]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": "ignored", "prompt_id": "x", "messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
            [USER, ASSISTANT],
        ),
        (
            {"messages": [{"role": "developer", "content": "short"}, USER, ASSISTANT]},
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"messages": [USER, ASSISTANT, USER]}, [USER, ASSISTANT]),  # nothing to learn after the last answer
    ],
)
def test_conversations_are_recognised(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert sft(row) == Conversation(messages)


def test_a_format_and_keys_may_be_named() -> None:
    row = {"text": "x", "instruction": "hi", "output": "be"}
    with pytest.raises(BadRow, match=r"'text', 'instruction', 'output' match several formats: alpaca, text"):
        sft(row, learn="all")
    assert sft(row, format="alpaca") == Conversation([USER, ASSISTANT])
    assert sft(row, text_key="text", learn="all") == Text("x")
    assert sft({"q": "hi", "a": "be"}, prompt_key="q", response_key="a") == Conversation([USER, ASSISTANT])
    assert sft({"chat": [USER, ASSISTANT], "text": "x"}, messages_key="chat") == Conversation(
        [USER, ASSISTANT]
    )
    with pytest.raises(BadRow, match=r"no column 'messages' or 'conversations' \(data.messages_key\)"):
        sft({"prompt": "hi", "response": "be"}, format="messages")
    with pytest.raises(BadRow, match=r"'a', 'b' match no format; tried: messages .*; alpaca .*; text"):
        sft({"a": 1, "b": 2})


def test_a_system_prompt_goes_before_what_has_none() -> None:
    row = {"prompt": "hi", "response": "be"}
    assert sft(row, system_prompt="short") == Conversation([SYSTEM, USER, ASSISTANT])
    assert sft({**row, "system": "short"}, system_prompt="unlike") == Conversation([SYSTEM, USER, ASSISTANT])
    assert sft({**row, "s": "short"}, system_key="s") == Conversation([SYSTEM, USER, ASSISTANT])
    assert sft({"messages": [SYSTEM, USER, ASSISTANT]}, system_prompt="unlike") == Conversation(
        [SYSTEM, USER, ASSISTANT]
    )


def test_tool_calls_and_tools() -> None:
    add = {"type": "function", "function": {"name": "add", "arguments": {}}}
    call = {"role": "assistant", "tool_calls": [add]}
    messages = [USER, call, {"role": "tool", "content": "3"}, ASSISTANT]
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert sft({"messages": messages, "tools": tools}) == Conversation(messages, tools)
    assert sft({"messages": messages, "tools": json.dumps(tools)}) == Conversation(messages, tools)
    assert sft({"messages": messages, "tools": None}) == Conversation(messages)


def test_a_reward_goes_before_the_last_question() -> None:
    row = {"messages": [USER, ASSISTANT, USER, ASSISTANT], "r": 1.5}
    found = sft(row, reward_key="r", reward_template="[{}] ")
    assert [message["content"] for message in found.messages] == ["hi", "be", "[1.5] hi", "be"]


HH = "\n\nHuman: hi\n\nAssistant: be\n\nHuman: so\n\nAssistant:"
HH_PROMPT = [USER, ASSISTANT, {"role": "user", "content": "so"}]
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    "row, prompt, margin",
    [
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, [USER], 0),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": 2}, [USER], 2),
        ({"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]}, [SYSTEM, USER], 0),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, [USER], 0),
        ({"chosen": HH + " yes", "rejected": HH + " no"}, HH_PROMPT, 0),
        (  # UltraFeedback, binarised
            {
                "prompt": "hi",
                "chosen": [USER, YES],
                "rejected": [USER, NO],
                "score_chosen": 8.5,
                "score_rejected": 6,
            },
            [USER],
            2.5,
        ),
    ],
)
def test_pairs_are_recognised(row: dict[str, Any], prompt: list[dict[str, str]], margin: float) -> None:
    assert pair(row) == Pair(prompt, YES, NO, margin)


def test_a_transcript_is_the_prompt_of_a_model_without_a_chat_template() -> None:
    found = pair({"chosen": HH + " yes", "rejected": HH + " no"}, apply_chat_template=False)
    assert found.prompt == [{"role": "user", "content": HH}]
    assert (found.chosen["content"], found.rejected["content"]) == (" yes", " no")


def test_other_columns_of_pairs() -> None:
    row = {"q": "hi", "good": "yes", "bad": "no", "m": "1.5"}
    keys = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad", "margin_key": "m"}
    assert pair(row, **keys) == Pair([USER], YES, NO, 1.5)


@pytest.mark.parametrize("label, desirable", [(True, True), (0, False), ("true", True), ("False", False)])
def test_judged_answers_are_recognised(label: Any, desirable: bool) -> None:
    assert judged({"prompt": "hi", "completion": "be", "label": label}) == Judged(
        [USER], ASSISTANT, desirable
    )
    assert judged({"messages": [USER, ASSISTANT], "label": label}) == Judged([USER], ASSISTANT, desirable)
    named = judged(
        {"q": "hi", "a": [ASSISTANT], "ok": label}, prompt_key="q", response_key="a", label_key="ok"
    )
    assert named == Judged([USER], ASSISTANT, desirable)


@pytest.mark.parametrize(
    "labels, found",
    [
        ([True, False], [1.0, 0.0]),
        (["+", "-"], [1.0, 0.0]),
        (["good", "Bad"], [1.0, 0.0]),
        ([0.25, 1], [0.25, 1.0]),
    ],
)
def test_labels_of_steps(labels: list[Any], found: list[float | None]) -> None:
    assert steps({"prompt": "hi", "completions": ["a", "b"], "labels": labels}) == Steps(
        [USER], ["a", "b"], found
    )


@pytest.mark.parametrize(
    "neutral, found", [("positive", 1.0), ("negative", 0.0), ("half", 0.5), ("ignore", None)]
)
def test_ratings_of_steps(neutral: str, found: float | None) -> None:
    row = {"problem": "hi", "steps": ["a", "b", "c"], "ratings": [-1, 0, 1]}
    assert steps(row, label_scale="rating", neutral=neutral).labels == [0.0, found, 1.0]


def test_prm800k_follows_what_was_chosen() -> None:
    def completion(text: str, rating: int | None) -> dict[str, Any]:
        return {"text": text, "rating": rating, "flagged": False}

    row = {
        "question": {"problem": "hi", "ground_truth_answer": "3"},
        "label": {
            "steps": [
                {
                    "completions": [completion("x", -1), completion("a", 1)],
                    "human_completion": None,
                    "chosen_completion": 1,
                },
                {
                    "completions": [completion("y", -1)],
                    "human_completion": {"text": "b", "rating": None},
                    "chosen_completion": None,
                },
                {"completions": [completion("c", 0)], "human_completion": None, "chosen_completion": 0},
                {"completions": [completion("d", -1)], "human_completion": None, "chosen_completion": None},
            ],
            "finish_reason": "found_error",
        },
    }
    assert steps(row) == Steps([USER], ["a", "b", "c", "d"], [1.0, 1.0, 1.0, 0.0])
    assert steps(row, neutral="ignore").labels == [1.0, 1.0, None, 0.0]


def test_math_shepherd_is_split_at_its_marks() -> None:
    row = {
        "input": "1+1, then +1? Step 1: 1+1=2 ки\nStep 2: 2+1=4. The answer is: 4 ки",
        "label": "1+1, then +1? Step 1: 1+1=2 +\nStep 2: 2+1=4. The answer is: 4 -",
        "task": "GSM8K",
    }
    assert steps(row) == Steps(
        [{"role": "user", "content": "1+1, then +1?"}],
        ["Step 1: 1+1=2 ", "\nStep 2: 2+1=4. The answer is: 4 "],
        [1.0, 0.0],
    )


def test_ids() -> None:
    config = SftDataConfig.model_validate({"train": "a.jsonl", "id_key": "id"})
    assert id_of({"id": 3}, config) != id_of({"id": "3"}, config)
    with pytest.raises(BadRow, match="the id column 'id' holds None"):
        id_of({"id": None}, config)
    assert id_of({}, SftDataConfig.model_validate({"train": "a.jsonl"})) == ""
