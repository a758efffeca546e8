"""Preparing supervised examples with Ray Data, from files to the store.

Token ids as tests/data/test_chat.py derives them: <s> 1, </s> 2, <|user|> 4, <|assistant|> 5, byte b is b - 25.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.batch import Example, TokenSequence
from rayrlhf.config.examples import (
    ExampleDataConfig,
    KtoDataConfig,
    PairDataConfig,
    PrmDataConfig,
    SftDataConfig,
)
from rayrlhf.data.example_store import EXAMPLE_SCHEMA, ExampleStore, examples_of
from rayrlhf.data.examples import prepare_examples
from rayrlhf.data.rows import DataError
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


def plain(asked: str, answer: str) -> TokenSequence:
    answer_ids = [*ids(answer), 2]
    return TokenSequence([1, *ids(asked), *answer_ids], [0] * (1 + len(asked)) + [1] * len(answer_ids), [])


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
