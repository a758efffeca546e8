"""Writes prompts of a reasoning-gym task as JSONL: short sums and differences that a 135M model can learn.

Usage: `python -m jobs.tasks.sums [folder]`, by default into jobs/tasks/data. The files are a pure function of
the settings below; no training question is among the held-out ones. Each row is an unchanged entry of
reasoning-gym (question, answer, metadata), so the reward source `{type: reasoning_gym}` can score
it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rayrlhf.reward.graders import import_reasoning_gym

DATA_PATH = Path(__file__).resolve().parent / "data"
TASK = "chain_sum"
SETTINGS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
NUM_TRAIN, NUM_TEST = 2048, 256
SEED = 0


def ensure_data(folder: Path = DATA_PATH) -> tuple[Path, Path]:
    """(train, test) files; writes them when they are missing."""
    train, test = folder / "sums-train.jsonl", folder / "sums-test.jsonl"
    if not (train.exists() and test.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        held_out, rest = split(distinct_entries(NUM_TRAIN + NUM_TEST))
        write(test, held_out)
        write(train, rest)
    return train, test


def distinct_entries(count: int) -> list[dict[str, Any]]:
    """The first `count` entries with different questions."""
    distinct: dict[str, dict[str, Any]] = {}
    dataset: Any = import_reasoning_gym().create_dataset(TASK, size=4 * count, seed=SEED, **SETTINGS)
    for entry in dataset:
        distinct.setdefault(entry["question"], entry)
        if len(distinct) == count:
            return list(distinct.values())
    raise ValueError(f"{TASK} with {SETTINGS} has only {len(distinct)} different questions, wanted {count}")


def split(entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return entries[:NUM_TEST], entries[NUM_TEST:]


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    for file in ensure_data(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_PATH):
        print(file)
