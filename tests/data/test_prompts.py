"""Preparing prompts with Ray Data, from files to the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.prepare import prepare_prompts
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import PromptStore
from rayrlhf.samples import Prompt
from tests.tiny_model import make_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_lines(path: Path, *prompts: Any) -> None:
    path.write_text("".join(json.dumps({"prompt": prompt, "file": path.name}) + "\n" for prompt in prompts))


def prepare(folder: Path, tokenizer_path: str, train: Any, seed: int = 0, **fields: Any) -> PromptStore:
    config = PromptDataConfig.model_validate({"train": train, "apply_chat_template": False, **fields})
    return prepare_prompts(config.train, config, tokenizer_path, folder / "out" / "train.arrow", seed)


def texts(store: PromptStore) -> list[str]:
    return [prompt.prompt.removeprefix("<s>") for prompt in store]


def test_rows_of_all_files_in_order(
    tmp_path: Path, tokenizer_path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines").mkdir()
    write_lines(tmp_path / "lines" / "b.jsonl", *[f"b{n}" for n in range(300)])  # more than a batch
    write_lines(tmp_path / "lines" / "a.jsonl", "hi", [{"role": "user", "content": "hi"}])
    (tmp_path / "table.csv").write_text("prompt,n\nlast,1\n")
    sources = [f"jsonl@{tmp_path}/lines", f"{tmp_path}/table.csv"]
    capfd.readouterr()
    store = prepare(tmp_path, tokenizer_path, sources, apply_chat_template=True)
    assert capfd.readouterr() == ("", ""), "nothing is printed"
    chat = [1, 4, 79, 80, 2, 5]  # <s> <|user|> h i </s> <|assistant|>, as test_chat.py derives them
    hi = "<s><|user|>hi</s><|assistant|>"
    assert store[0] == Prompt(0, chat, hi, {"prompt": "hi", "file": "a.jsonl"})
    messages = [{"role": "user", "content": "hi"}]
    assert store[1] == Prompt(1, chat, hi, {"prompt": messages, "file": "a.jsonl"})
    assert [prompt.columns["prompt"] for prompt in store][2:-1] == [f"b{n}" for n in range(300)]
    assert [prompt.row_id for prompt in store] == list(range(303))
    assert store[302].columns == {"prompt": "last", "n": "1"}
    assert store.counts == {
        "rows": 303,
        "skipped_bad": 0,
        "dropped_long": 0,
        "truncated": 0,
        "unused_by_mixing": 0,
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.arrow"]
    again = prepare(tmp_path, tokenizer_path, sources, apply_chat_template=True)
    assert again.fingerprint == store.fingerprint


@pytest.fixture
def with_bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a"}\n' * 1500  # past what is looked at beforehand
    path.write_bytes(good.encode() + b'{"prompt": \n{"prompt": "\xff"}\n{"question": "b"}\n{"prompt": "b"}\n')
    return path


def test_bad_rows_are_named(tmp_path: Path, tokenizer_path: str, with_bad_rows: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tokenizer_path, str(with_bad_rows))
    message = str(caught.value)
    assert type(caught.value) is DataError and "Traceback" not in message
    assert f"{with_bad_rows}:1501: not valid JSON" in message
    assert f"{with_bad_rows}:1502: not UTF-8 (byte 0xff" in message
    assert (
        f"{with_bad_rows}:1503: no column 'prompt' (data.prompt_key); the columns are: 'question'" in message
    )
    assert "data.on_bad_row=skip" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_rows_are_skipped_and_counted(
    tmp_path: Path, tokenizer_path: str, with_bad_rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = prepare(tmp_path, tokenizer_path, str(with_bad_rows), on_bad_row="skip")
    assert texts(store) == ["a"] * 1500 + ["b"]
    assert (store.counts["rows"], store.counts["skipped_bad"]) == (1501, 3)
    assert f"{with_bad_rows}:1501: not valid JSON" in caplog.text


@pytest.mark.parametrize("policy", ["fail", "drop", "truncate"])
def test_long_prompts(tmp_path: Path, tokenizer_path: str, policy: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, "abc", "abcdef", "abcd")  # with <s> 4, 7 and 5 tokens
    config = {"max_prompt_tokens": 5, "on_long_prompt": policy}
    if policy == "fail":
        with pytest.raises(DataError, match=f"(?s)={5}.*{path}:2: 7 tokens.*max_prompt_tokens to 7 or more"):
            prepare(tmp_path, tokenizer_path, str(path), **config)
        return
    store = prepare(tmp_path, tokenizer_path, str(path), **config)
    counts = (store.counts["rows"], store.counts["dropped_long"], store.counts["truncated"])
    if policy == "drop":
        assert (texts(store), counts) == (["abc", "abcd"], (2, 1, 0))
    else:  # the last five tokens
        assert (texts(store), counts) == (["abc", "bcdef", "abcd"], (3, 0, 1))
        assert store[1].columns["prompt"] == "abcdef"


def test_sources_are_mixed_by_probability(tmp_path: Path, tokenizer_path: str) -> None:
    write_lines(tmp_path / "a.jsonl", *[f"a{n}" for n in range(40)])
    write_lines(tmp_path / "b.jsonl", *[f"b{n}" for n in range(40)])
    sources = [
        {"path": f"{tmp_path}/a.jsonl", "probability": 0.8},
        {"path": f"{tmp_path}/b.jsonl", "probability": 0.2},
    ]
    first = prepare(tmp_path, tokenizer_path, sources, seed=1)
    found = texts(first)
    of_a, of_b = [text for text in found if text[0] == "a"], [text for text in found if text[0] == "b"]
    assert of_a == [f"a{n}" for n in range(40)]
    assert of_b == [f"b{n}" for n in range(len(of_b))] and 0 < len(of_b) < 40
    assert first.counts["unused_by_mixing"] == 40 - len(of_b)
    assert [prompt.row_id for prompt in first] == list(range(len(found)))
    assert texts(prepare(tmp_path, tokenizer_path, sources, seed=2)) != found


@pytest.mark.parametrize(
    "name, content, fields, message",
    [
        ("rows.json", '[{"prompt": "a"},\n {"prompt"}]', {}, "rows.json:2: not valid JSON"),
        ("rows.jsonl", "", {}, "holds no rows: .*rows.jsonl"),
        ("rows.jsonl", "[1]\n", {"on_bad_row": "skip"}, "no usable row in data.train.0..*1 bad rows skipped"),
        (
            "rows.jsonl",
            '{"prompt": "a"}',
            {"chat_template": "none.jinja", "apply_chat_template": True},
            "none.jinja",
        ),
    ],
)
def test_what_stops_a_run_comes_bare(
    tmp_path: Path, tokenizer_path: str, name: str, content: str, fields: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, tokenizer_path, f"{tmp_path}/{name}", **fields)
    assert type(caught.value) is DataError


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", "a")
    with pytest.raises(DataError, match=f"no tokenizer can be loaded from {tmp_path}/none"):
        prepare(tmp_path, f"{tmp_path}/none", f"{tmp_path}/rows.jsonl")
