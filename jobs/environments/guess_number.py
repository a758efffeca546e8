"""A multi-turn game: find a hidden number by guessing, with "higher" or "lower" as answers to each guess.

In the config:

    data: {train: jsonl@jobs/environments/data/guess_number.jsonl}
    rollout: {environment: {environment: "jobs.environments.guess_number:GuessNumber", max_turns: 6}}
    reward: {sources: [{type: environment}]}

Reward: 1 for the number at the first guess, `lateness` less for every guess before it; nothing when the turns
run out. Bisection is optimal; `best_mean_reward` is its mean reward.

Usage, to write prompts: `python -m jobs.environments.guess_number [file]`
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

from jobs.environments.calculator import write_rows

DATA_PATH = Path(__file__).resolve().parent / "data" / "guess_number.jsonl"
NUMBER = re.compile(r"-?\d+")
TEMPLATE = (
    "I have chosen a number from {low} to {high}. Guess it: answer with a number only, and I will say "
    "whether mine is higher or lower."
)


class GuessNumber:
    """`higher`, `lower`: its answers to a guess; `nonsense`: its answer to a response without a number."""

    def __init__(
        self,
        *,
        lateness: float = 0.05,
        higher: str = "higher",
        lower: str = "lower",
        nonsense: str = "Please answer with a number.",
    ) -> None:
        self.lateness = lateness
        self.higher = higher
        self.lower = lower
        self.nonsense = nonsense
        self.number = 0
        self.reward = 1.0

    def reset(self, row: dict[str, Any]) -> str:
        """The task is in the column `prompt`, the hidden number in `number`."""
        self.number = int(row["number"])
        return row["prompt"]

    def step(self, response: str) -> tuple[str, float, bool]:
        """The last number in the response is the guess."""
        reward = self.reward
        self.reward = max(0.0, self.reward - self.lateness)
        guesses = NUMBER.findall(response)
        if not guesses:
            return self.nonsense, 0.0, False
        guess = int(guesses[-1])
        if guess == self.number:
            return "", reward, True
        return self.higher if guess < self.number else self.lower, 0.0, False


def best_mean_reward(count: int, *, max_turns: int, lateness: float = 0.05) -> float:
    """Mean reward of bisection over `count` equally likely numbers.

    Turn t finds at most 2^(t-1) of them, those that t-1 answers can distinguish.
    """
    left, total = count, 0.0
    for turn in range(max_turns):
        found = min(left, 2**turn)
        total += found * max(0.0, 1.0 - lateness * turn)
        left -= found
    return total / count


def make_rows(
    count: int, *, seed: int, low: int = 1, high: int = 31, template: str = TEMPLATE
) -> list[dict[str, Any]]:
    """Rows {prompt, low, high, number}."""
    rng = random.Random(seed)
    prompt = template.format(low=low, high=high)
    return [
        {"prompt": prompt, "low": low, "high": high, "number": rng.randint(low, high)} for _ in range(count)
    ]


if __name__ == "__main__":
    written = write_rows(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_PATH, make_rows(2000, seed=0))
    print(f"wrote {written}")
