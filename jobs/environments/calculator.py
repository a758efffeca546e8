"""An environment with a tool: sums that the policy may hand to a calculator before it answers.

The policy writes `<calc>12*7</calc>` and is given the result as the next message; a response with
`<answer>84</answer>`, or without any call, is its answer and ends the episode. In the config:

    data: {train: jsonl@jobs/environments/data/calculator.jsonl}
    rollout:
      sampling: {stop: ["</calc>", "</answer>"]}
      environment: {environment: "jobs.environments.calculator:Calculator", max_turns: 4}
    reward: {sources: [{type: environment}]}

Reward: 1 for the right number; `form_reward` (small) for another number, which is at least an answer; else 0.

Usage, to write prompts: `python -m jobs.environments.calculator [file]`
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA_PATH = Path(__file__).resolve().parent / "data" / "calculator.jsonl"
INSTRUCTIONS = (
    "Solve the task. To use a calculator write <calc>, an expression and </calc>; its result is sent to you. "
    "Give the final number as <answer>number</answer>."
)
CALL = re.compile(r"<calc>(.*?)(?:</calc>|$)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
MAX_EXPRESSION = 100  # characters; without powers, a result has then at most about as many digits
TOLERANCE = 1e-6  # relative, for results that are no integers


class Calculator:
    """`role`: of the calculator's messages; `tool` if the chat template supports it."""

    def __init__(
        self, *, role: str = "user", instructions: str = INSTRUCTIONS, form_reward: float = 0.05
    ) -> None:
        self.role = role
        self.instructions = instructions
        self.form_reward = form_reward
        self.answer = 0.0

    def reset(self, row: dict[str, Any]) -> str:
        """The task is in the column `prompt`, the right number in `answer`."""
        self.answer = float(row["answer"])
        return "\n".join(filter(None, [self.instructions, row["prompt"]]))

    def step(self, response: str) -> tuple[dict[str, str], float, bool]:
        call, answer = CALL.search(response), ANSWER.search(response)
        if call is not None and answer is None:
            return {"role": self.role, "content": calculate(call[1])}, 0.0, False
        return {}, self.score(answer[1] if answer is not None else response), True

    def score(self, answer: str) -> float:
        """Reward of the last number in the text."""
        numbers = NUMBER.findall(answer.replace(",", ""))
        if not numbers:
            return 0.0
        right = abs(float(numbers[-1]) - self.answer) <= TOLERANCE * max(1.0, abs(self.answer))
        return 1.0 if right else self.form_reward


def calculate(expression: str) -> str:
    """The result, or an error message for the policy. Nothing but arithmetic is evaluated."""
    if len(expression) > MAX_EXPRESSION:
        return "error: too long"
    try:
        result = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(result) if isinstance(result, int) else f"{result:.10g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return "error: not an expression"


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value  # True is one of them, and counts as 1
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def make_rows(
    count: int,
    *,
    seed: int,
    largest: int = 99,
    operators: Sequence[str] = "+-*",
    num_terms: int = 3,
    template: str = "What is {}?",
) -> list[dict[str, str]]:
    """Rows {prompt, expression, answer}: sums of `num_terms` numbers from 1 to `largest`."""
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    for _ in range(count):
        expression = str(rng.randint(1, largest))
        for _ in range(num_terms - 1):
            expression += rng.choice(operators) + str(rng.randint(1, largest))
        rows.append(
            {
                "prompt": template.format(expression),
                "expression": expression,
                "answer": calculate(expression),
            }
        )
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    written = write_rows(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_PATH, make_rows(2000, seed=0))
    print(f"wrote {written}")
