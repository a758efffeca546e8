"""The demo's prompts."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.demo.data import TEMPLATES, ensure_data, prompt_rows, topic_rows


def test_counts() -> None:
    # 32 lines of ten topics; seven of each train with all four templates, three are held out with one each.
    assert [len(topics) for _, topics in topic_rows()] == [10] * 32
    train, test = prompt_rows()
    assert (len(train), len(test)) == (32 * 7 * 4, 32 * 3)


def test_held_out_topics_are_never_trained_on() -> None:
    train, test = prompt_rows()
    train_topics = {row["topic"] for row in train}
    test_topics = {row["topic"] for row in test}
    assert len(test_topics) == 96
    assert len(train_topics) == 224
    assert not train_topics & test_topics


def test_held_out_prompts_use_every_template_equally() -> None:
    _, test = prompt_rows()
    for template in TEMPLATES:
        assert sum(row["prompt"] == template.format(row["topic"]) for row in test) == 96 / 4


def test_most_topics_are_gloomy() -> None:
    for rows in prompt_rows():
        assert sum(row["mood"] == "negative" for row in rows) / len(rows) == 22 / 32


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in ensure_data(tmp_path)]
    train_path, test_path = ensure_data(tmp_path)
    assert [train_path.read_bytes(), test_path.read_bytes()] == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]
    rows = [json.loads(line) for line in train_path.read_text().splitlines()]
    assert {
        "prompt": "Write one short sentence about a rainy Monday.",
        "topic": "a rainy Monday",
        "mood": "negative",
    } in rows
