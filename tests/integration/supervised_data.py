"""Small data sets that a tiny byte-level model can learn, one for every kind of supervised job."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOWELS, CONSONANTS = "aeiou", "bcdfgklmnprst"
STEP_TOKEN = "<|extra|>"


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word(rng: random.Random, letters: str, length: int) -> str:
    return "".join(rng.choice(letters) for _ in range(length))


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The answer repeats the question's letter: `say k` -> `kkkk`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        letter = rng.choice(VOWELS + CONSONANTS)
        question = {"role": "user", "content": f"say {letter}"}
        rows.append({"messages": [question, {"role": "assistant", "content": letter * rng.randint(3, 6)}]})
    return rows


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Separable: the chosen answer is all vowels, the rejected one all consonants."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"say {i % 50}",
            "chosen": word(rng, VOWELS, rng.randint(3, 12)),
            "rejected": word(rng, CONSONANTS, rng.randint(3, 12)),
        }
        for i in range(count)
    ]


def judged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Vowels are desirable; there are half as many of them."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"say {i % 50}",
            "completion": word(rng, VOWELS if i % 3 == 0 else CONSONANTS, rng.randint(3, 12)),
            "label": i % 3 == 0,
        }
        for i in range(count)
    ]


def solutions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Steps of vowels, with wrong ones of consonants planted among them."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        labels = [rng.random() < 0.6 for _ in range(rng.randint(2, 5))]
        steps = [word(rng, VOWELS if good else CONSONANTS, rng.randint(2, 6)) for good in labels]
        rows.append({"prompt": f"solve {i % 50}", "completions": steps, "labels": labels})
    return rows
