"""Rewards that break their contract. Nothing else is here: each is imported by a separate process."""

from __future__ import annotations

from typing import Any


def raises(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
    raise ZeroDivisionError("no vowels at all")


def too_few(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
    return [1.0]


def not_a_number(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
    return [float("nan")] * len(responses)
