"""Shards of batch inference: partition of the rows, which shards are done, shard files. No Ray here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any

from rayrlhf.samples import Prompt, Sample
from rayrlhf.storage.folder import Folder

PROMPT_TOKENS, RESPONSE_TOKENS = "prompt_tokens", "response_tokens"
# Columns that are added to a row; with several samples all but the first three are lists.
NEW_COLUMNS = (
    "row_id",
    PROMPT_TOKENS,
    "error",
    "response",
    "responses",
    "truncated",
    RESPONSE_TOKENS,
    "score",
    "scores",
    "rewards",
)


@dataclass(frozen=True)
class Shard:
    index: int
    start: int  # position in the run: row `first_row + start`, wrapping around to 0 after the last row
    stop: int  # exclusive

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(num_rows: int, rows_per_shard: int) -> list[Shard]:
    """The smallest number of shards that hold `num_rows`, of nearly equal length (no short last shard)."""
    count = math.ceil(num_rows / rows_per_shard)
    edges = [num_rows * index // count for index in range(count + 1)]
    return [Shard(index, edges[index], edges[index + 1]) for index in range(count)]


def rows_of(shard: Shard, first_row: int, num_stored: int) -> list[int]:
    """The row ids of a shard."""
    return [(first_row + place) % num_stored for place in range(shard.start, shard.stop)]


@dataclass(frozen=True)
class ShardFolder:
    """Folder with the files of finished shards."""

    folder: Folder

    def pending(self, shards: Sequence[Shard]) -> list[Shard]:
        finished = self.folder.sizes().keys()
        return [shard for shard in shards if _file_of(shard) not in finished]

    def write(self, shard: Shard, rows: Sequence[dict[str, Any]]) -> None:
        self.folder.write(_file_of(shard), "".join(json_line(row) for row in rows))

    def read(self, shard: Shard) -> bytes:
        found = self.folder.read(_file_of(shard))
        if found is None:
            raise FileNotFoundError(f"{self.folder}/{_file_of(shard)}")
        return found

    def remove(self) -> None:
        self.folder.parent.remove(self.folder.name)


def _file_of(shard: Shard) -> str:
    return f"{shard.index:06d}.jsonl"


def json_line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which can only be written as an escape
        text = json.dumps(row)
    return text + "\n"


def merge(folder: ShardFolder, shards: Sequence[Shard], output: Path) -> None:
    """Concatenate all shards, in order, into one file; written atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    with partial.open("wb") as merged:
        for shard in shards:
            merged.write(folder.read(shard))
        merged.flush()
        os.fsync(merged.fileno())
    os.replace(partial, output)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def answered_row(prompt: Prompt, samples: Sequence[Sample], *, names: Sequence[str] | None) -> dict[str, Any]:
    """The input row with its responses. `names` are the reward sources, None without scoring.

    A single sample is written to `response`, `score` and so on, several to `responses`, `scores` and lists.
    """
    answers: dict[str, list[Any]] = {
        "response": [sample.response for sample in samples],
        "truncated": [sample.truncated for sample in samples],
        RESPONSE_TOKENS: [len(sample.response_ids) for sample in samples],
    }
    if names is not None:
        answers["score"] = [sample.score for sample in samples]
        answers["rewards"] = [dict(zip(names, sample.source_rewards, strict=True)) for sample in samples]
    row = _head(prompt)
    if len(samples) == 1:
        return row | {key: values[0] for key, values in answers.items()}
    plural = {"response": "responses", "score": "scores"}
    return row | {plural.get(key, key): values for key, values in answers.items()}


def failed_row(prompt: Prompt, reason: str, *, group_size: int) -> dict[str, Any]:
    """The input row without a response, with the reason."""
    return _head(prompt) | {"response" if group_size == 1 else "responses": None, "error": reason}


def _head(prompt: Prompt) -> dict[str, Any]:
    return {
        **{key: value for key, value in prompt.columns.items() if key not in NEW_COLUMNS},
        "row_id": prompt.row_id,
        PROMPT_TOKENS: len(prompt.prompt_ids),
    }


@dataclass(frozen=True)
class Answer:
    """One sample of an output row."""

    response: str
    score: float | None
    truncated: bool

    @property
    def known_score(self) -> float:
        assert self.score is not None
        return self.score


def answers_of(row: dict[str, Any]) -> list[Answer]:
    """All samples of an output row; empty for a failed row."""
    if row.get("error") is not None:
        return []
    if "responses" not in row:
        return [Answer(row["response"], row.get("score"), row["truncated"])]
    scores = row.get("scores") or [None] * len(row["responses"])
    return list(starmap(Answer, zip(row["responses"], scores, row["truncated"], strict=True)))


@dataclass
class Tally:
    """Totals over the rows of a run."""

    rows: int = 0
    failed_rows: int = 0
    samples: int = 0
    unscored_samples: int = 0
    truncated_samples: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    scores: list[float] = field(default_factory=list)  # mean score of each row that has a score

    def add(self, row: dict[str, Any], *, scored: bool) -> None:
        self.rows += 1
        self.prompt_tokens += row[PROMPT_TOKENS]
        answers = answers_of(row)
        self.failed_rows += not answers
        if not answers:
            return
        self.samples += len(answers)
        self.truncated_samples += sum(answer.truncated for answer in answers)
        lengths = row[RESPONSE_TOKENS]
        self.response_tokens += sum(lengths) if isinstance(lengths, list) else lengths
        known = [answer.score for answer in answers if answer.score is not None]
        if scored:
            self.unscored_samples += len(answers) - len(known)
        if known:
            self.scores.append(sum(known) / len(known))

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def score(self) -> tuple[float | None, tuple[float, float] | None]:
        """Mean over rows, and its 95 % interval by the normal approximation (None for fewer than 2 rows)."""
        count = len(self.scores)
        if not count:
            return None, None
        mean = math.fsum(self.scores) / count
        if count == 1:
            return mean, None
        variance = math.fsum((score - mean) ** 2 for score in self.scores) / (count - 1)
        half = 1.96 * math.sqrt(variance / count)
        return mean, (mean - half, mean + half)


def tally_file(path: Path, *, scored: bool) -> Tally:
    tally = Tally()
    for row in read_rows(path):
        tally.add(row, scored=scored)
    return tally
