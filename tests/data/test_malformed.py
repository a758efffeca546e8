"""What real data sets get wrong: named with file and row, or skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.example_data import (
    ExampleDataConfig,
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)
from rayrlhf.data.checks import check_example_sources
from rayrlhf.data.prepare import prepare_examples
from rayrlhf.data.rows.row import DataError
from tests.tiny_model import make_tokenizer

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "be"}
SYSTEM, TOOL = {"role": "system", "content": "x"}, {"role": "tool", "content": "3"}
NESTED = "[" * 100_000 + "]" * 100_000


def messages(*said: Any) -> str:
    return json.dumps({"messages": said})


def pair(**columns: Any) -> str:
    return json.dumps({"prompt": "hi", "chosen": "yes", "rejected": "no", **columns})


def judged(**columns: Any) -> str:
    return json.dumps({"prompt": "hi", "completion": "be", "label": True, **columns})


def steps(**columns: Any) -> str:
    return json.dumps({"prompt": "hi", "steps": ["a", "b"], "labels": [1, 0], **columns})


GOOD = {"sft": messages(USER, ASSISTANT), "pair": pair(), "kto": judged(), "prm": steps()}
GOOD_KTO = judged(prompt="ho")  # KTO needs another prompt
KINDS: dict[str, tuple[type[ExampleDataConfig], dict[str, Any]]] = {
    "sft": (SftDataConfig, {}),
    "pair": (PairDataConfig, {}),
    "kto": (KtoDataConfig, {}),
    "prm": (PrmDataConfig, {"step_token": "<|extra|>"}),
}
# What is seen without a tokenizer: (kind, the line, what is said of it).
MALFORMED: list[tuple[str, str | bytes, str]] = [
    ("sft", '{"messages": [', "not valid JSON"),
    ("sft", "[1, 2]", "an array, not an object"),
    ("sft", b'{"text": "\xff"}', "not UTF-8"),
    ("sft", '{"messages": ' + NESTED + "}", "not valid JSON"),
    ("sft", "{}", "its columns none match no format"),
    ("sft", '{"chat": []}', "its columns 'chat' match no format; tried: messages"),
    ("sft", '{"messages": []}', "an empty list of messages"),
    ("sft", '{"messages": null}', "match no format"),
    ("sft", '{"messages": 3}', "column 'messages' holds a value of type int; wanted a list"),
    ("sft", '{"messages": "[{"}', "column 'messages' is a text that is not valid JSON"),
    ("sft", messages("hi"), "message 1 in column 'messages' is a text"),
    ("sft", messages({"content": "hi"}), "message 1 in column 'messages' has no role"),
    ("sft", messages(USER, {"role": "assistant"}), "message 2 in column 'messages' has no content"),
    ("sft", messages(USER, {**ASSISTANT, "content": None}), "message 2 in column 'messages' has no content"),
    (
        "sft",
        messages(USER, {**ASSISTANT, "content": 3}),
        "the content of message 2 .* is a value of type int",
    ),
    (
        "sft",
        messages(USER, {**ASSISTANT, "role": "narrator"}),
        "has the role 'narrator'; wanted system, user",
    ),
    ("sft", messages(ASSISTANT, USER), "the role 'assistant' at the beginning; wanted system or user"),
    ("sft", messages(USER, USER, ASSISTANT), "the role 'user' after 'user'; wanted assistant"),
    (
        "sft",
        messages(USER, ASSISTANT, ASSISTANT),
        "the role 'assistant' after 'assistant'; wanted user or tool",
    ),
    ("sft", messages(USER, TOOL, ASSISTANT), "the role 'tool' after 'user'; wanted assistant"),
    ("sft", messages(SYSTEM, SYSTEM, USER, ASSISTANT), "two system messages"),
    (
        "sft",
        json.dumps({"system": "y", "messages": [SYSTEM, USER, ASSISTANT]}),
        "two system messages: column",
    ),
    ("sft", messages(USER), "has no message of the assistant"),
    ("sft", messages(USER, {**ASSISTANT, "content": ""}), r"message 2 \(assistant\) .* is empty"),
    ("sft", messages(USER, {**ASSISTANT, "content": " \n"}), r"message 2 \(assistant\) .* is empty"),
    ("sft", messages(USER, {**ASSISTANT, "content": "\ud83d"}), "is not valid Unicode text"),
    ("sft", '{"conversations": [{"from": "alien", "value": "hi"}]}', "a message from 'alien'; known roles"),
    ("sft", '{"prompt": "hi", "response": ""}', "column 'response' is empty"),
    ("sft", '{"prompt": "hi", "response": 3}', "column 'response' holds a value of type int"),
    ("sft", '{"text": "hi"}', "set data.learn=all"),
    (
        "sft",
        '{"text": "hi", "prompt": "hi", "response": "be"}',
        "match several formats: prompt_response, text",
    ),
    ("sft", json.dumps({"messages": [USER, ASSISTANT], "tools": 3}), "wanted a list of tool definitions"),
    ("pair", '{"prompt": "hi", "chosen": "yes"}', "no column 'rejected'"),
    ("pair", pair(rejected=None), "column 'rejected' holds null"),
    ("pair", pair(rejected=["no"]), "message 1 in column 'rejected' is a text"),
    ("pair", pair(rejected=" "), "column 'rejected' is empty"),
    ("pair", pair(rejected="yes"), "hold the same answer"),
    ("pair", pair(margin=float("nan")), "the margin column 'margin' holds nan; wanted a finite number"),
    ("pair", pair(margin="much"), "the margin column 'margin' holds 'much'"),
    ("pair", '{"chosen": "yes", "rejected": "no"}', "match no format; tried: prompt"),
    (
        "pair",
        json.dumps({"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "ho"}, ASSISTANT]}),
        "differ before their last answers",
    ),
    (
        "pair",
        json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}),
        "differ before their last answers",
    ),
    ("pair", json.dumps({"chosen": [USER], "rejected": [USER]}), "does not end with an assistant message"),
    ("kto", '{"prompt": "hi", "completion": "be"}', "no column 'label'"),
    ("kto", judged(label=None), "the label column 'label' holds None; wanted true or false"),
    ("kto", judged(label="good"), "the label column 'label' holds 'good'"),
    ("kto", judged(label=0.5), "the label column 'label' holds 0.5"),
    ("prm", steps(labels=[1]), "1 labels for 2 steps"),
    ("prm", steps(labels=None), "match no format"),
    ("prm", steps(labels="++"), "column 'labels' holds a text; wanted a list"),
    ("prm", steps(labels=[1, None]), "the label of step 2 is None"),
    ("prm", steps(labels=[1, -1]), "set data.label_scale=rating"),
    ("prm", steps(labels=[1, 1.5]), "the label of step 2 is 1.5"),
    ("prm", steps(labels=[1, float("nan")]), "the label of step 2 is nan"),
    ("prm", steps(steps=[]), "there are no steps"),
    ("prm", steps(steps=["a", " "]), "step 2 is empty"),
    ("prm", steps(steps=["a", 3]), "step 2 is a value of type int"),
    ("prm", steps(steps=["a<|extra|>b", "c"]), "step 1 contains data.step_token"),
    ("prm", '{"question": {"problem": "hi"}, "label": {"steps": [{}]}}', "not in PRM800K's format"),
    ("prm", '{"input": "q Step 1: a ки", "label": "q Step 1: a "}', r"has no \+ or - after step 1"),
]
# What only the tokens show.
TOO_LONG = {"max_tokens": 12, "on_long": "truncate_head"}
MALFORMED_TOKENS: list[tuple[str, str, dict[str, Any], str]] = [
    ("sft", messages(USER, {**ASSISTANT, "content": "a" * 12}), TOO_LONG, "its answer alone has 13 tokens"),
    ("pair", pair(chosen="a" * 12), TOO_LONG, "its answer alone has 13 tokens"),
    ("kto", judged(completion="a" * 12), TOO_LONG, "its answer alone has 13 tokens"),
    (
        "sft",
        messages({**USER, "content": "a" * 12}, ASSISTANT),
        {"max_tokens": 12, "on_long": "truncate_tail"},
        "nothing of its answer is left",
    ),
]


def config_of(kind: str, path: Path, **fields: Any) -> ExampleDataConfig:
    class_, own = KINDS[kind]
    return class_.model_validate({"train": str(path), **own, **fields})


def write(path: Path, kind: str, line: str | bytes) -> Path:
    """A good row, the bad one in line 2, and good ones."""
    bad = line if isinstance(line, bytes) else line.encode()
    good = GOOD[kind].encode()
    last = GOOD_KTO.encode() if kind == "kto" else good
    path.write_bytes(b"\n".join([good, bad, good, last, b""]))
    return path


@pytest.mark.parametrize("kind, line, problem", MALFORMED)
def test_it_is_reported_with_file_and_row(tmp_path: Path, kind: str, line: str | bytes, problem: str) -> None:
    path = write(tmp_path / "rows.jsonl", kind, line)
    with pytest.raises(DataError, match=rf"{path}:2: .*{problem}") as caught:
        check_example_sources(config_of(kind, path))
    assert str(caught.value).count(f"{path}:") == 1, "the good rows are good"
    check_example_sources(config_of(kind, path, on_bad_row="skip"))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_kind_in_one_file_are_skipped_and_counted(
    tmp_path: Path, kind: str, tokenizer_path: str
) -> None:
    lines = [line if isinstance(line, bytes) else line.encode() for k, line, _ in MALFORMED if k == kind]
    path = tmp_path / "rows.jsonl"
    good = [GOOD[kind].encode(), GOOD_KTO.encode() if kind == "kto" else GOOD[kind].encode()]
    path.write_bytes(b"\n".join([good[0], *lines, good[1], b""]))
    config = config_of(kind, path, on_bad_row="skip")
    store = prepare_examples(config.train, config, tokenizer_path, tmp_path / "out.arrow", 0)
    assert (store.counts["rows"], store.counts["skipped_bad"]) == (2, len(lines))
    with pytest.raises(DataError, match=f"{path}:2: "):
        failing = config_of(kind, path)
        prepare_examples(failing.train, failing, tokenizer_path, tmp_path / "out.arrow", 0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind, line, fields, problem", MALFORMED_TOKENS)
def test_what_only_tokens_show(
    tmp_path: Path, tokenizer_path: str, kind: str, line: str, fields: dict[str, Any], problem: str
) -> None:
    path = write(tmp_path / "rows.jsonl", kind, line)
    config = config_of(kind, path, **fields)
    with pytest.raises(DataError, match=f"{path}:2: {problem}"):
        prepare_examples(config.train, config, tokenizer_path, tmp_path / "out.arrow", 0)
    skipping = config_of(kind, path, on_bad_row="skip", **fields)
    store = prepare_examples(skipping.train, skipping, tokenizer_path, tmp_path / "out.arrow", 0)
    assert (store.counts["rows"], store.counts["skipped_bad"]) == (3, 1)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"data.train\[0\]: .*rows.jsonl holds no rows"):
        check_example_sources(config_of("sft", tmp_path / "rows.jsonl"))


def test_rows_of_several_shapes_in_one_file_are_fine(tmp_path: Path) -> None:
    rows = [GOOD["sft"], '{"prompt": "hi", "response": "be"}', '{"instruction": "hi", "output": "be"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    check_example_sources(config_of("sft", tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"topic": "none of the shapes"}']))
    with pytest.raises(DataError, match=r"rows.jsonl:4"):
        check_example_sources(config_of("sft", tmp_path / "rows.jsonl"))


def test_a_file_of_nothing_but_bad_rows_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match="no usable row among the first 2"):
        check_example_sources(config_of("sft", tmp_path / "rows.jsonl", on_bad_row="skip"))
