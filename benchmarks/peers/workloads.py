"""The rows that both sides train on: a pure function of the word list and the seed, no download.

Lengths vary as those of conversations do (log-normal), which is what packing and padding differ by.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEED = 0
SYSTEM = "Be brief."
UNUSED_TOKEN = "<gh_stars>"  # of the model's vocabulary
WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "window",
    "garden",
    "little",
    "old",
    "bright",
    "over",
    "under",
    "through",
    "because",
    "while",
    "after",
    "morning",
    "winter",
    "letter",
    "journey",
    "bridge",
    "music",
    "kitchen",
    "table",
    "paper",
    "green",
    "yellow",
    "heavy",
    "walks",
    "writes",
    "keeps",
    "finds",
    "opens",
    "carries",
    "remembers",
    "people",
    "children",
    "teacher",
    "doctor",
    "friend",
    "village",
    "city",
    "mountain",
    "water",
    "light",
    "answer",
    "question",
    "number",
    "first",
    "second",
    "almost",
    "never",
    "always",
    "often",
    "together",
    "quietly",
    "again",
    "and",
    "but",
    "or",
    "with",
    "from",
    "into",
    "about",
    "between",
]

Row = dict[str, Any]


def conversations(count: int, *, mean_words: int) -> list[Row]:
    """{"messages": [system, user, assistant]}"""
    generator = random.Random(SEED)
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": _text(generator, mean_words // 4)},
                {"role": "assistant", "content": _text(generator, mean_words)},
            ]
        }
        for _ in range(count)
    ]


def preferences(count: int, *, mean_words: int) -> list[Row]:
    """{"chosen": [user, assistant], "rejected": [the same user, assistant]}, system messages included."""
    generator = random.Random(SEED + 1)
    rows = []
    for _ in range(count):
        prompt = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": _text(generator, mean_words // 2)},
        ]
        chosen, rejected = (
            [*prompt, {"role": "assistant", "content": _text(generator, mean_words)}] for _ in range(2)
        )
        rows.append({"chosen": chosen, "rejected": rejected})
    return rows


def prompts(count: int, *, words: int) -> list[Row]:
    """{"prompt": text} of a fixed number of words, so that all sides read the same number of tokens."""
    generator = random.Random(SEED + 2)
    return [{"prompt": " ".join(generator.choices(WORDS, k=words))} for _ in range(count)]


def write(rows: Iterable[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def endless_model(model: Path, copy: Path) -> Path:
    """A folder with the same weights whose end of text is a token that the model does not write.

    So every response has the full length on every side, with an engine and a trainer that agree on what may
    be sampled. It has no chat template, whose end of turn would be another end.
    """
    copy.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".safetensors" or file.name == "tokenizer.json":
            (copy / file.name).unlink(missing_ok=True)
            (copy / file.name).symlink_to(file.resolve())
    vocabulary = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    ids = {"eos_token_id": next(token["id"] for token in vocabulary if token["content"] == UNUSED_TOKEN)}
    for name, changes in (
        ("config.json", ids),
        ("generation_config.json", ids),
        ("tokenizer_config.json", {"eos_token": UNUSED_TOKEN}),
    ):
        (copy / name).write_text(json.dumps(json.loads((model / name).read_text()) | changes))
    return copy


def _text(generator: random.Random, mean_words: int) -> str:
    words = min(round(generator.lognormvariate(0, 0.6) * mean_words * 0.84) + 4, 4 * mean_words)
    return " ".join(generator.choices(WORDS, k=words)).capitalize() + "."
