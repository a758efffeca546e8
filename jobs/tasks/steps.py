"""Writes step-by-step solutions, some steps of which are wrong, for training process reward models.

A chain of sums: "Start at 3. Add 4, then 2, then 5." is solved as "3 + 4 = 7", "7 + 2 = 9", "9 + 5 = 14". A
wrong step has a wrong result, from which the next step continues correctly: only that step is wrong.

Usage: `python -m jobs.tasks.steps [folder]`, by default into jobs/tasks/data.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from jobs.tasks.sentences import DATA_PATH, write

NUM_TRAIN, NUM_TEST = 2048, 256
WRONG_STEPS = 0.3  # of all
SEED = 0


def ensure_data(folder: Path = DATA_PATH) -> tuple[Path, Path]:
    """(train, test) files; no problem of one occurs in the other."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < NUM_TRAIN + NUM_TEST:
        row = solution(rng)
        rows.setdefault(row["prompt"], row)
    all_rows = list(rows.values())
    return (
        write(folder / "steps-train.jsonl", all_rows[NUM_TEST:]),
        write(folder / "steps-test.jsonl", all_rows[:NUM_TEST]),
    )


def solution(rng: random.Random) -> dict[str, Any]:
    """One row {prompt, completions, labels}: steps, and whether each is right."""
    start = value = rng.randint(1, 9)
    terms = [rng.randint(1, 9) for _ in range(rng.randint(2, 4))]
    terms_text = ", then ".join(map(str, terms))
    steps, labels = [], []
    for term in terms:
        right = rng.random() >= WRONG_STEPS
        result = value + term + (0 if right else rng.choice((-3, -2, 2, 3)))
        steps.append(f"{value} + {term} = {result}")
        labels.append(right)
        value = result
    return {"prompt": f"Start at {start}. Add {terms_text}.", "completions": steps, "labels": labels}


if __name__ == "__main__":
    for file in ensure_data(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_PATH):
        print(file)
