"""The guessing game: what it says, what a guess is worth, and how well the best player does."""

from __future__ import annotations

import pytest

from jobs.environments.guess_number import GuessNumber, best_mean_reward, make_rows


def test_it_says_where_to_go() -> None:
    game = GuessNumber(lateness=0.25)
    assert game.reset({"prompt": "Guess.", "low": 1, "high": 9, "number": 5}) == "Guess."
    assert game.step("Is it 3?") == ("higher", 0.0, False)
    assert game.step("not 3, but 8") == ("lower", 0.0, False)
    assert game.step("No idea") == ("Please answer with a number.", 0.0, False)
    assert game.step("5")[1:] == (0.25, True), "1 less three quarters for three guesses before"


def test_the_first_guess_is_worth_one_and_no_guess_less_than_nothing() -> None:
    game = GuessNumber(lateness=0.6)
    game.reset({"prompt": "Guess.", "number": 5})
    assert game.step("5")[1:] == (1.0, True)
    late = GuessNumber(lateness=0.6)
    late.reset({"prompt": "Guess.", "number": 5})
    late.step("1")
    late.step("2")
    assert late.step("5")[1:] == (0.0, True)


@pytest.mark.parametrize(
    "count, max_turns, best",
    [
        (1, 1, 1.0),
        (3, 2, (1.0 + 2 * 0.9) / 3),
        (7, 3, (1.0 + 2 * 0.9 + 4 * 0.8) / 7),
        (7, 2, (1.0 + 2 * 0.9) / 7),  # four are never found
        (5, 9, (1.0 + 2 * 0.9 + 2 * 0.8) / 5),
    ],
)
def test_the_best_mean_reward(count: int, max_turns: int, best: float) -> None:
    assert best_mean_reward(count, max_turns=max_turns, lateness=0.1) == pytest.approx(best)


@pytest.mark.parametrize("high", [1, 6, 7, 31])
def test_halving_is_the_best(high: int) -> None:
    rewards: list[float] = []
    for number in range(1, high + 1):
        game, low, top, reward, done = GuessNumber(), 1, high, 0.0, False
        game.reset({"prompt": "", "number": number})
        while not done:
            guess = (low + top) // 2
            said, reward, done = game.step(str(guess))
            low, top = (guess + 1, top) if said == "higher" else (low, guess - 1)
        rewards.append(reward)
    assert sum(rewards) / high == pytest.approx(best_mean_reward(high, max_turns=5))


def test_rows_are_fixed_by_the_seed() -> None:
    rows = make_rows(200, seed=1, low=3, high=6)
    assert rows == make_rows(200, seed=1, low=3, high=6) != make_rows(200, seed=2, low=3, high=6)
    assert {row["number"] for row in rows} == {3, 4, 5, 6}
    assert "from 3 to 6" in rows[0]["prompt"]
