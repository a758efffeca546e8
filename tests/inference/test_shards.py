"""Which rows go together, what an interrupted run has done already, and what rows come to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.inference.shards import (
    ShardFolder,
    Tally,
    answered_row,
    answers_of,
    failed_row,
    json_line,
    merge,
    plan_shards,
    rows_of,
    tally_file,
)
from rayrlhf.inference.worker import too_many
from rayrlhf.storage.folder import LocalFolder
from tests.samples import make_prompt, make_sample


def test_shards_are_of_nearly_one_length() -> None:
    assert [len(shard) for shard in plan_shards(257, 256)] == [128, 129]
    assert [len(shard) for shard in plan_shards(256, 256)] == [256]


@given(st.integers(1, 500), st.integers(1, 60))
def test_every_row_is_in_one_shard_in_order(num_rows: int, rows_per_shard: int) -> None:
    shards = plan_shards(num_rows, rows_per_shard)
    assert [row for shard in shards for row in rows_of(shard, 0, num_rows)] == list(range(num_rows))
    assert all(1 <= len(shard) <= rows_per_shard for shard in shards)
    assert len(shards) == -(-num_rows // rows_per_shard)


def test_rows_wrap_around_after_the_last() -> None:
    [shard] = plan_shards(4, 10)
    assert rows_of(shard, 8, 10) == [8, 9, 0, 1]
    assert rows_of(shard, 12, 10) == [2, 3, 4, 5]  # a later round of a chain


def test_what_is_done_is_what_has_its_name(tmp_path: Path) -> None:
    path, shards = tmp_path / "shards", plan_shards(6, 2)
    folder = ShardFolder(LocalFolder(path))
    folder.write(shards[2], [{"row_id": 4}, {"row_id": 5}])
    folder.write(shards[0], [{"row_id": 0}, {"row_id": 1}])
    (path / ".000001.jsonl.7.ab.partial").write_text('{"row_id"')  # killed while it wrote
    assert folder.pending(shards) == [shards[1]]
    folder.write(shards[1], [{"row_id": 2}, {"row_id": 3}])
    assert folder.pending(shards) == []
    output = tmp_path / "elsewhere" / "out.jsonl"
    merge(folder, shards, output)
    assert [json.loads(line)["row_id"] for line in output.read_text().splitlines()] == list(range(6))
    folder.remove()
    assert not path.exists()


PROMPT = make_prompt([5, 6, 7], row_id=3, topic="é", note=[1])


def test_a_row_keeps_its_columns() -> None:
    sample = replace(make_sample([7, 8], response="ab", truncated=True, score=0.5), source_rewards=(1.0,))
    assert answered_row(PROMPT, [sample], names=["r"]) == {
        "topic": "é",
        "note": [1],
        "row_id": 3,
        "prompt_tokens": 3,
        "response": "ab",
        "truncated": True,
        "response_tokens": 2,
        "score": 0.5,
        "rewards": {"r": 1.0},
    }


def test_several_samples_stand_in_lists() -> None:
    samples = [make_sample([7], response="a"), make_sample([7, 8], response="b", truncated=True)]
    row = answered_row(PROMPT, samples, names=None)
    assert row["responses"] == ["a", "b"] and row["response_tokens"] == [1, 2]
    assert not {"response", "score", "scores", "rewards"} & row.keys()
    assert [(a.response, a.score, a.truncated) for a in answers_of(row)] == [
        ("a", None, False),
        ("b", None, True),
    ]


def test_a_failed_row_says_why() -> None:
    row = failed_row(PROMPT, "TimeoutError: no engine", group_size=1)
    assert row["response"] is None and row["error"] == "TimeoutError: no engine" and row["topic"] == "é"
    assert failed_row(PROMPT, "x", group_size=2)["responses"] is None
    assert answers_of(row) == []


def test_half_a_surrogate_pair_is_escaped() -> None:
    line = json_line({"a": "é\ud800"})
    assert json.loads(line.encode().decode()) == {"a": "é\ud800"}
    assert json_line({"a": "é"}) == '{"a": "é"}\n'


def test_what_rows_come_to(tmp_path: Path) -> None:
    def scored(*scores: float | None) -> dict[str, object]:
        samples = [replace(make_sample([7, 8], score=s), source_rewards=(s,)) for s in scores]
        return answered_row(PROMPT, samples, names=["r"])

    rows = [scored(1.0, 3.0), scored(None, 4.0), failed_row(PROMPT, "x", group_size=2)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(map(json_line, rows)))
    tally = tally_file(file, scored=True)
    assert tally.counts() == {
        "rows": 3,
        "failed_rows": 1,
        "samples": 4,
        "unscored_samples": 1,
        "truncated_samples": 0,
        "prompt_tokens": 9,
        "response_tokens": 8,
    }
    mean, interval = tally.score()
    # Row means 2 and 4: mean 3, sample variance 2, so the half width is 1.96 · sqrt(2 / 2).
    assert mean == 3.0 and interval == pytest.approx((3 - 1.96, 3 + 1.96))
    assert Tally().score() == (None, None)


def test_how_many_may_fail() -> None:
    assert not too_many(1, 10, 0.1)
    assert too_many(2, 10, 0.1)
    assert too_many(10, 10, 1.0), "when nothing worked there is nothing to go on with"
    assert not too_many(0, 1, 0.0)
