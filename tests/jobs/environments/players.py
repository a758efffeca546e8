"""Players that generate training data (tests/pretrained_tiny.py): good ones, and ones that mostly guess."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from jobs.environments import calculator, guess_number
from jobs.environments.calculator import Calculator
from jobs.environments.guess_number import GuessNumber
from tests.pretrained_tiny import Message, Player, make_pretrained

# Few tokens: every byte is one.
CALCULATOR: dict[str, Any] = {"role": "tool", "instructions": "", "form_reward": 0.0}
GUESS_NUMBER: dict[str, Any] = {"higher": ">", "lower": "<"}
HIGHEST = 7  # of the numbers to guess, from 1
GUESSES = 3  # just enough for halving
MOST_CLUMSY_GUESS = 15


def sums(count: int, *, seed: int) -> list[dict[str, str]]:
    """Rows such as {"prompt": "7+5", "answer": "12"}."""
    return calculator.make_rows(count, seed=seed, largest=9, operators="+", num_terms=2, template="{}")


def hidden_numbers() -> list[dict[str, Any]]:
    """Each number twice."""
    [row] = guess_number.make_rows(1, seed=0, high=HIGHEST, template="{low}-{high}")
    return [{**row, "number": number} for number in range(1, HIGHEST + 1)] * 2


def calculating(care: float) -> Player:
    """With probability `care` asks the calculator and repeats what it says; else answers with any number."""

    def play(messages: list[Message], row: dict[str, Any], rng: random.Random) -> str:
        if len(messages) > 1:
            return messages[-1]["content"]
        return f"<calc>{row['expression']}</calc>" if rng.random() < care else str(rng.randint(0, 18))

    return play


def guessing(care: float) -> Player:
    """With probability `care` guesses within what is left, half the time its middle; else any number."""

    def play(messages: list[Message], row: dict[str, Any], rng: random.Random) -> str:
        if rng.random() >= care:
            return str(rng.randint(0, MOST_CLUMSY_GUESS))
        low, high = row["low"], row["high"]
        for guess, heard in zip(messages[1::2], messages[2::2], strict=False):
            if heard["content"] == GUESS_NUMBER["higher"]:
                low = max(low, int(guess["content"]) + 1)
            else:
                high = min(high, int(guess["content"]) - 1)
        return str((low + high) // 2 if rng.random() < 0.5 else rng.randint(low, high))

    return play


def calculator_model(path: Path, *, seed: int) -> str:
    """The folder of a tiny model that can use the calculator, but seldom does."""
    lessons = [(calculating(0.8), 120), (calculating(0.12), 40)]
    return make_pretrained(
        path, lambda: Calculator(**CALCULATOR), lessons, sums(2000, seed=seed), max_turns=2, seed=seed
    )


def guessing_model(path: Path, *, seed: int) -> str:
    """The folder of a tiny model that can halve a range, but mostly guesses anything."""
    lessons = [(guessing(0.9), 120), (guessing(0.15), 40)]
    return make_pretrained(
        path, lambda: GuessNumber(**GUESS_NUMBER), lessons, hidden_numbers(), max_turns=GUESSES, seed=seed
    )
