"""Batch inference on a tiny model with everything real: Data, Serve, vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.inference import driver as generate
from rayrlhf.inference.driver import run_generate
from rayrlhf.inference.worker import Pace
from tests.integration.answer_runs import VOWELS, lines_of, tiny_generation
from tests.integration.policy_runs import share_of_vowels

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

SCORED: dict[str, Any] = {"reward": {"sources": [VOWELS]}, "rollout": {"group_size": 2}}


def interrupt_after_first_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SIGTERM does it: by a KeyboardInterrupt in the driver."""
    add = Pace.add

    def add_and_stop(pace: Pace, result: dict[str, Any]) -> None:
        add(pace, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pace, "add", add_and_stop)


@pytest.mark.long
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = tiny_generation(tmp_path / "whole", tiny_model, **SCORED)
    assert run_generate(whole) == 0
    expected = tmp_path / "whole/runs/tiny/generations.jsonl"

    # Also in other shards: many, so that some are left after the first.
    parts = tiny_generation(tmp_path / "parts", tiny_model, generate={"rows_per_shard": 1}, **SCORED)
    run_path = tmp_path / "parts/runs/tiny"
    with monkeypatch.context() as patched:
        interrupt_after_first_shard(patched)
        assert run_generate(parts) == 130
    done = sorted(file.name for file in (run_path / "shards").glob("*.jsonl"))
    assert 1 <= len(done) < 24 and not (run_path / "generations.jsonl").exists()
    (run_path / "shards" / ".000002.jsonl.1.ab.partial").write_text('{"row_id": 16')  # what a kill -9 leaves

    other = parts.model_copy(update={"run": parts.run.model_copy(update={"seed": 1})})
    assert run_generate(other) == 2
    assert "run.seed: was 0, is 1" in capsys.readouterr().err

    assert run_generate(parts) == 0
    assert "resuming after" in capsys.readouterr().out
    assert (run_path / "generations.jsonl").read_bytes() == expected.read_bytes()
    assert not (run_path / "shards").exists()

    rows = lines_of(expected)
    assert [(row["row_id"], row["topic"], row["note"]) for row in rows] == [(i, i, "é") for i in range(24)]
    for row in rows:
        assert len(row["responses"]) == 2 and row["scores"] == share_of_vowels([], row["responses"], [])
        assert row["rewards"] == [{"vowels": score} for score in row["scores"]]
        assert all(1 <= length <= 12 for length in row["response_tokens"])
    assert len({text for row in rows for text in row["responses"]}) > 40, "each sample has its own seed"
    summary = json.loads((run_path / "summary.json").read_text())
    assert (summary["rows"], summary["samples"], summary["failed_rows"]) == (24, 48, 0)

    monkeypatch.setattr(generate, "deploy", None)  # a third start has nothing to bring up
    assert run_generate(parts) == 0


@pytest.mark.long
def test_rows_that_fail_are_written_with_the_reason(tmp_path: Path, tiny_model: str) -> None:
    """An engine that holds 70 tokens refuses what is longer; the other rows are answered."""
    rows = [{"prompt": "a" * (90 if i == 5 else 10)} for i in range(8)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "mixed.jsonl"), "apply_chat_template": False, "max_prompt_tokens": 95}
    limits = {"max_failed_fraction": 0.5, "retries": 1}
    config = tiny_generation(tmp_path, tiny_model, data=data, generate=limits)
    with pytest.MonkeyPatch.context() as patched:
        settings = generate.engine_settings

        def shorter(*sections: Any, **numbers: Any) -> Any:
            return settings(*sections, **{**numbers, "max_model_tokens": 70})

        patched.setattr(generate, "engine_settings", shorter)
        assert run_generate(config) == 0
    written = lines_of(tmp_path / "runs/tiny/generations.jsonl")
    assert [row["row_id"] for row in written] == list(range(8))
    assert [row["row_id"] for row in written if row["response"] is None] == [5]
    assert "error" in written[5] and not any("error" in row for row in written[:5])


def test_given_responses_are_scored(tmp_path: Path, tiny_model: str) -> None:
    """Without any engine."""
    rows = [{"prompt": "say", "response": text} for text in ("aaaa", "bbbb", "abab")]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scored.jsonl"
    config = tiny_generation(
        tmp_path,
        tiny_model,
        data={"train": str(tmp_path / "given.jsonl"), "response_key": "response"},
        generate={"output": str(output)},
        reward={"sources": [VOWELS]},
    )
    assert run_generate(config) == 0
    assert [(row["response"], row["score"]) for row in lines_of(output)] == [
        ("aaaa", 1.0),
        ("bbbb", 0.0),
        ("abab", 0.5),
    ]


def test_columns_that_would_be_lost_are_named(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scored.jsonl").write_text('{"prompt": "say", "score": 3}\n')
    config = tiny_generation(tmp_path, tiny_model, data={"train": str(tmp_path / "scored.jsonl")})
    assert run_generate(config) == 2
    assert "'score'" in (shown := capsys.readouterr().err) and "overwrite_columns" in shown
