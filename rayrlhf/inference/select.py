"""Selects training rows for a chain's training stage from scored responses. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rayrlhf.config.chains import RESPONSE, REWARD, ChoiceSection, LabelSection, PairSection
from rayrlhf.inference.shards import Answer, answers_of

Chosen = tuple[list[dict[str, Any]], dict[str, int]]  # rows, counts by name


def best_of_n(rows: Iterable[dict[str, Any]], columns: Sequence[str], section: ChoiceSection) -> Chosen:
    """The highest-scored response of each row, the first of equal ones; rows without one are counted."""
    chosen: list[dict[str, Any]] = []
    counts = Counter(chosen=0, below_min_score=0, without_response=0)
    for row in rows:
        usable = _usable(row, drop_truncated=section.drop_truncated)
        if not usable:
            counts["without_response"] += 1
            continue
        best = max(usable, key=lambda answer: answer.known_score)
        if section.min_score is not None and best.known_score < section.min_score:
            counts["below_min_score"] += 1
            continue
        counts["chosen"] += 1
        chosen.append({**_prompt_columns(row, columns), RESPONSE: best.response, "score": best.score})
    return chosen, dict(counts)


def best_and_worst(rows: Iterable[dict[str, Any]], columns: Sequence[str], section: PairSection) -> Chosen:
    """The pair of best and worst response of each row, the first of equal ones each.

    A tie (a score difference of at most `min_margin`, or twice the same text) is skipped and counted, as is a
    row with fewer than two usable responses.
    """
    pairs: list[dict[str, Any]] = []
    counts = Counter(pairs=0, ties=0, too_few_responses=0)
    for row in rows:
        usable = _usable(row, drop_truncated=section.drop_truncated)
        if len(usable) < 2:
            counts["too_few_responses"] += 1
            continue
        best = max(usable, key=lambda answer: answer.known_score)
        worst = min(usable, key=lambda answer: answer.known_score)
        if best.known_score - worst.known_score <= section.min_margin or best.response == worst.response:
            counts["ties"] += 1
            continue
        counts["pairs"] += 1
        pairs.append(
            {
                **_prompt_columns(row, columns),
                "chosen": best.response,
                "rejected": worst.response,
                "score_chosen": best.score,
                "score_rejected": worst.score,
            }
        )
    return pairs, dict(counts)


def labelled(rows: Iterable[dict[str, Any]], columns: Sequence[str], section: LabelSection) -> Chosen:
    """Every scored response with its rounded reward as a label; optionally normalised over all responses."""
    answers: list[tuple[dict[str, Any], Answer]] = []
    without = 0
    for row in rows:
        usable = _usable(row, drop_truncated=section.drop_truncated)
        without += not usable
        answers += [(row, answer) for answer in usable]
    scores = [answer.known_score for _, answer in answers]
    mean, deviation = 0.0, 1.0
    if section.normalize and scores:
        mean = math.fsum(scores) / len(scores)
        variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
        deviation = math.sqrt(variance) or 1.0
    labels = [
        {
            **_prompt_columns(row, columns),
            RESPONSE: answer.response,
            REWARD: round((answer.known_score - mean) / deviation, section.decimals) + 0.0,  # no "-0"
            "score": answer.score,
        }
        for row, answer in answers
    ]
    return labels, {"labelled": len(labels), "without_response": without}


def _prompt_columns(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The prompt of the row, with system message and tools if present, and its `row_id`."""
    return {**{name: row[name] for name in columns if name in row}, "row_id": row["row_id"]}


def _usable(row: dict[str, Any], *, drop_truncated: bool) -> list[Answer]:
    """Responses that are scored and not empty."""
    return [
        answer
        for answer in answers_of(row)
        if answer.score is not None and answer.response.strip() and not (drop_truncated and answer.truncated)
    ]
