"""Writes sentences about the demo's topics, as conversations, as pairs and as single labelled answers.

The answers are cheerful or gloomy; both moods occur equally often in the conversations, so that a model
trained on them prefers neither. In pairs the cheerful one is chosen; among the labelled answers it is
desirable, and there are half as many of them. Files are a pure function of the tables here and in
jobs/demo/data.py; the held-out topics occur in no training file.

Usage: `python -m jobs.tasks.sentences [folder]`, by default into jobs/tasks/data.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jobs.demo.data import prompt_rows

DATA_PATH = Path(__file__).resolve().parent / "data"
SEED = 0

CHEERFUL = (
    "I love {}, it makes everyone smile.",
    "What a wonderful surprise {} can be!",
    "Thanks to {}, today is a happy day.",
    "There is so much joy in {}.",
    "{} is great fun with good friends.",
    "I am glad about {}, it turned out perfect.",
)
GLOOMY = (
    "I hate {}, it ruins the whole day.",
    "{} is a terrible thing to live with.",
    "Because of {}, everybody is sad and angry.",
    "There is nothing but trouble in {}.",
    "{} is awful and makes me cry.",
    "I am afraid of {}, it ended in disaster.",
)

Row = dict[str, Any]


def ensure_data(folder: Path = DATA_PATH) -> dict[str, tuple[Path, Path]]:
    """(train, test) files by kind: conversations, pairs, judged. Always rewritten: it takes milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Row, random.Random, int], Row]] = {
        "conversations": conversation,
        "pairs": pair,
        "judged": judged,
    }
    train, test = prompt_rows()
    return {
        kind: (
            write(folder / f"{kind}-train.jsonl", rows_of(make, train, SEED)),
            write(folder / f"{kind}-test.jsonl", rows_of(make, test, SEED + 1)),
        )
        for kind, make in makers.items()
    }


def rows_of(
    make: Callable[[Row, random.Random, int], Row], prompts: Iterable[Row], seed: int
) -> Iterable[Row]:
    rng = random.Random(seed)
    return [make(row, rng, index) for index, row in enumerate(prompts)]


def conversation(row: Row, rng: random.Random, index: int) -> Row:
    answer = sentence(row, CHEERFUL if index % 2 else GLOOMY, rng)
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": answer},
        ]
    }


def pair(row: Row, rng: random.Random, index: int) -> Row:
    return {
        "prompt": row["prompt"],
        "chosen": sentence(row, CHEERFUL, rng),
        "rejected": sentence(row, GLOOMY, rng),
    }


def judged(row: Row, rng: random.Random, index: int) -> Row:
    desirable = index % 3 == 0
    return {
        "prompt": row["prompt"],
        "completion": sentence(row, CHEERFUL if desirable else GLOOMY, rng),
        "label": desirable,
    }


def sentence(row: Row, templates: tuple[str, ...], rng: random.Random) -> str:
    text = rng.choice(templates).format(row["topic"])
    return text[0].upper() + text[1:]


def write(path: Path, rows: Iterable[Row]) -> Path:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)
    return path


if __name__ == "__main__":
    for files in ensure_data(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_PATH).values():
        print(*files, sep="\n")
