"""The calculator: what it works out, what it refuses, and what an answer is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.environments.calculator import Calculator, calculate, make_rows, write_rows


@pytest.mark.parametrize(
    "expression, result",
    [
        ("12*7", "84"),
        (" 1 + 2*3 ", "7"),
        ("(1+2)*-3", "-9"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("7//2 + 7%4", "6"),
        ("1/0", "error: division by zero"),
        ("1.5%0", "error: division by zero"),
        ("", "error: not an expression"),
        ("12*", "error: not an expression"),
        ("2**9999", "error: not an expression"),  # powers would take for ever
        ("2+True", "3"),
        ("'a'*3", "error: not an expression"),
        ("__import__('os').getpid()", "error: not an expression"),
        ("[1][0]", "error: not an expression"),
        ("1\x00", "error: not an expression"),
        ("(" * 99, "error: not an expression"),
        ("1+" * 60 + "1", "error: too long"),
    ],
)
def test_calculations(expression: str, result: str) -> None:
    assert calculate(expression) == result


def started(answer: str = "84") -> Calculator:
    environment = Calculator(form_reward=0.1)
    environment.reset({"prompt": "What is 12*7?", "answer": answer})
    return environment


def test_the_task_comes_with_its_instructions() -> None:
    row = {"prompt": "What is 12*7?", "answer": "84"}
    assert Calculator(instructions="Solve.").reset(row) == "Solve.\nWhat is 12*7?"
    assert Calculator(instructions="").reset(row) == "What is 12*7?"


@pytest.mark.parametrize(
    "response", ["<calc>12*7</calc>", "Well: <calc>12*7", "<calc>12*7</calc> <calc>1</calc>"]
)
def test_a_call_is_answered(response: str) -> None:
    assert started().step(response) == ({"role": "user", "content": "84"}, 0.0, False)


@pytest.mark.parametrize(
    "response, reward",
    [
        ("<answer>84</answer>", 1.0),
        ("<answer>84", 1.0),
        ("It is 84.", 1.0),
        ("12*7 = 84.0", 1.0),
        ("<calc>12*7</calc> so <answer>84</answer>", 1.0),
        ("<answer>85</answer>, or 84", 0.1),
        ("85", 0.1),
        ("<answer>many</answer> 84", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_ends_the_episode(response: str, reward: float) -> None:
    observation, got, done = started().step(response)
    assert (got, done, observation) == (reward, True, {})


def test_large_and_broken_numbers() -> None:
    assert started("1234567").step("1,234,567")[1] == 1.0
    assert started("0.3333333333").step("0.33333333")[1] == 1.0
    assert started("0.3333333333").step("0.33")[1] == 0.1


def test_rows_are_fixed_by_the_seed(tmp_path: Path) -> None:
    rows = make_rows(50, seed=3)
    assert rows == make_rows(50, seed=3) != make_rows(50, seed=4)
    assert all(str(eval(row["expression"])) == row["answer"] for row in rows)
    assert all(row["prompt"] == f"What is {row['expression']}?" for row in rows)
    small = make_rows(50, seed=0, largest=5, operators="*", num_terms=2, template="{}")
    assert {len(row["prompt"]) for row in small} == {3}
    lines = write_rows(tmp_path / "new" / "rows.jsonl", rows).read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
