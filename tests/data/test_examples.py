"""Preparing supervised examples with Ray Data, from files to the store.

Token ids as tests/data/test_chat.py derives them: <s> 1, </s> 2, <|user|> 4, <|assistant|> 5, byte b b - 25.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.config.example_data import (
    ExampleDataConfig,
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)
from rayrlhf.data.prepare import prepare_examples
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import EXAMPLE_SCHEMA, ExampleStore, examples_of
from rayrlhf.samples import Example, TokenSequence
from tests.tiny_model import make_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(
    config: ExampleDataConfig, folder: Path, tokenizer_path: str, seed: int = 0, split: Any = "train"
):
    sources = config.sources_of(split)
    return prepare_examples(sources, config, tokenizer_path, folder / "out" / f"{split}.arrow", seed, split)


def ids(text: str) -> list[int]:
    return [ord(char) - 25 for char in text]


def chat(asked: str, answer: str) -> TokenSequence:
    prompt_ids = [1, 4, *ids(asked), 2, 5]
    answer_ids = [*ids(answer), 2]
    return TokenSequence([*prompt_ids, *answer_ids], [0] * len(prompt_ids) + [1] * len(answer_ids), [])


def test_conversations_become_masked_sequences(tmp_path: Path, tokenizer_path: str) -> None:
    rows = [{"prompt": "hi", "response": "be"}, {"prompt": "a", "response": "bc"}]
    config = SftDataConfig.model_validate({"train": write_lines(tmp_path / "a.jsonl", rows)})
    store = prepare(config, tmp_path, tokenizer_path)
    assert list(store) == [Example(0, (chat("hi", "be"),)), Example(1, (chat("a", "bc"),))]
    assert store.num_tokens.tolist() == [9, 8] and store.num_tokens.dtype == np.int64
    assert store.counts == {
        "rows": 2,
        "skipped_bad": 0,
        "dropped_long": 0,
        "truncated": 0,
        "duplicates": 0,
        "unused_by_mixing": 0,
    }
    assert store.take([1, 0]).schema == EXAMPLE_SCHEMA
    assert examples_of(store.take([1, 0])) == [store[1], store[0]]
    assert pickle.loads(pickle.dumps(store))[1] == store[1]
    assert ExampleStore.open(store.path).fingerprint == store.fingerprint
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.arrow"]


def test_pairs_share_their_prompt(tmp_path: Path, tokenizer_path: str) -> None:
    rows = [{"prompt": "hi", "chosen": "be", "rejected": "c", "margin": 0.5}]
    config = PairDataConfig.model_validate({"train": write_lines(tmp_path / "a.jsonl", rows)})
    store = prepare(config, tmp_path, tokenizer_path)
    assert list(store) == [Example(0, (chat("hi", "be"), chat("hi", "c")), 0.5)]
    assert store.num_tokens.tolist() == [9 + 8]
    assert store.first_tokens.tolist() == [9]


@pytest.fixture
def answers(tmp_path: Path) -> str:
    """100 rows; row n is asked "n" and answers with n letters."""
    return write_lines(
        tmp_path / "rows.jsonl", [{"id": n, "prompt": str(n), "response": "a" * n} for n in range(1, 101)]
    )


def answers_in(store: ExampleStore) -> list[int]:
    return [sum(example.sequences[0].loss_mask) - 1 for example in store]  # without the ending token


def test_a_share_is_held_out_by_a_hash_of_the_row(tmp_path: Path, tokenizer_path: str, answers: str) -> None:
    config = SftDataConfig.model_validate({"train": answers, "eval_share": 0.2})
    train = answers_in(prepare(config, tmp_path, tokenizer_path))
    held_out = answers_in(prepare(config, tmp_path, tokenizer_path, split="eval"))
    assert sorted(train + held_out) == list(range(1, 101)) and train == sorted(train)
    assert 8 <= len(held_out) <= 32  # 3 standard deviations of a binomial around 20
    assert answers_in(prepare(config, tmp_path, tokenizer_path, seed=1, split="eval")) != held_out
    # What is held out stays so when rows are added, so that a longer data set can be compared.
    with open(answers, "a") as stream:
        stream.write(json.dumps({"prompt": "x", "response": "a" * 101}) + "\n")
    assert set(held_out) <= set(answers_in(prepare(config, tmp_path, tokenizer_path, split="eval")))


def test_rows_with_an_id_seen_before(tmp_path: Path, tokenizer_path: str) -> None:
    rows = [{"id": n % 2, "prompt": "a", "response": "b" * (n + 1)} for n in range(4)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = SftDataConfig.model_validate({"train": path, "id_key": "id"})
    with pytest.raises(DataError, match=f"{path}:3: the id 0 is already used by {path}:1"):
        prepare(config, tmp_path, tokenizer_path)
    skipping = config.model_copy(update={"on_duplicate_id": "skip"})
    store = prepare(skipping, tmp_path, tokenizer_path)
    assert (answers_in(store), store.counts["duplicates"]) == ([1, 2], 2)


@pytest.mark.parametrize("on_long", ["fail", "drop", "truncate_head", "truncate_tail"])
def test_long_examples(tmp_path: Path, tokenizer_path: str, on_long: str) -> None:
    rows = [{"prompt": "hi", "response": "a" * n} for n in (1, 9, 2)]  # 7 tokens and the answer's
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = SftDataConfig.model_validate({"train": path, "max_tokens": 12, "on_long": on_long})
    if on_long == "fail":
        with pytest.raises(DataError, match=f"(?s)max_tokens=12.*{path}:2: 16 tokens.*to 16 or more"):
            prepare(config, tmp_path, tokenizer_path)
        return
    store = prepare(config, tmp_path, tokenizer_path)
    counts = store.counts["rows"], store.counts["dropped_long"], store.counts["truncated"]
    assert counts == ((2, 1, 0) if on_long == "drop" else (3, 0, 1))
    assert store.num_tokens.tolist() == ([8, 9] if on_long == "drop" else [8, 12, 9])


def test_sources_are_mixed_until_all_are_through(tmp_path: Path, tokenizer_path: str) -> None:
    short = write_lines(tmp_path / "a.jsonl", [{"prompt": "x", "response": "a"}] * 5)
    long = write_lines(tmp_path / "b.jsonl", [{"prompt": "x", "response": "bb"}] * 60)
    sources = [{"path": short, "probability": 0.5}, {"path": long, "probability": 0.5}]
    config = SftDataConfig.model_validate({"train": sources, "mixing_stops": "all_exhausted"})
    store = prepare(config, tmp_path, tokenizer_path)
    found = answers_in(store)
    assert found.count(2) == 60 and found.count(1) > 30 and store.counts["unused_by_mixing"] == 0
    first = prepare(config.model_copy(update={"mixing_stops": "first_exhausted"}), tmp_path, tokenizer_path)
    assert answers_in(first).count(1) <= 5 and first.counts["unused_by_mixing"] == 65 - len(first)


def test_a_judged_response_comes_with_one_to_another_prompt(tmp_path: Path, tokenizer_path: str) -> None:
    rows = [{"prompt": f"q{n % 4}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(8)]
    config = KtoDataConfig.model_validate({"train": write_lines(tmp_path / "rows.jsonl", rows)})
    store = prepare(config, tmp_path, tokenizer_path)
    others = []
    for n, example in enumerate(store):
        own, mismatched = example.sequences
        assert own == chat(f"q{n % 4}", f"a{n}") and example.value == float(n % 2 == 0)
        other = next(m for m in range(8) if mismatched == chat(f"q{n % 4}", f"a{m}"))
        assert other % 4 != n % 4
        others.append(other)
    assert sorted(others) == list(range(8)), "each response serves once"
    assert store.first_tokens.tolist() == [len(example.sequences[0].input_ids) for example in store]
    again = prepare(config, tmp_path, tokenizer_path)
    assert list(again) == list(store) and again.fingerprint == store.fingerprint
    other = prepare(config, tmp_path, tokenizer_path, seed=1)
    assert list(other) != list(again) and other.fingerprint != store.fingerprint


def test_steps_come_with_their_targets(tmp_path: Path, tokenizer_path: str) -> None:
    rows = [{"prompt": "hi", "steps": ["a", "b"], "labels": [0.5, 0]}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = PrmDataConfig.model_validate({"train": path, "step_token": "<|extra|>"})
    [example] = prepare(config, tmp_path, tokenizer_path)
    input_ids = [1, 4, *ids("hi"), 2, 5, *ids("a"), 7, *ids("b"), 7]
    targets = [0.0] * 7 + [0.5, 0.0, 0.0]
    assert example == Example(0, (TokenSequence(input_ids, [0] * 7 + [1, 0, 1], targets),))
    wrong = config.model_copy(update={"step_token": "no"})
    with pytest.raises(DataError, match="is 2 tokens"):
        prepare(wrong, tmp_path, tokenizer_path)


def test_a_template_that_cannot_serve_stops_the_run_and_names_the_row(
    tmp_path: Path, tokenizer_path: str
) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "hi", "response": "be"}])
    fields = {"train": path, "chat_template": str(tmp_path / "chat.jinja"), "on_bad_row": "skip"}
    with pytest.raises(DataError, match=f"{path}:1: the chat template does not end the assistant's turn"):
        prepare(SftDataConfig.model_validate(fields), tmp_path, tokenizer_path)
