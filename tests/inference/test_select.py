"""Best of n, pairs and labels."""

from __future__ import annotations

from typing import Any

from rayrlhf.config.chains import ChoiceSection, LabelSection, PairSection
from rayrlhf.inference.select import best_and_worst, best_of_n, labelled


def row(row_id: int, *answers: tuple[str, float | None], truncated: int | None = None) -> dict[str, Any]:
    """A row with these (response, score); the one at index `truncated` was stopped by the limit."""
    return {
        "question": f"q{row_id}",
        "row_id": row_id,
        "responses": [response for response, _ in answers],
        "scores": [score for _, score in answers],
        "truncated": [index == truncated for index in range(len(answers))],
    }


FAILED = {"question": "q9", "row_id": 9, "responses": None, "error": "TimeoutError: no engine"}


def test_the_first_of_the_best_is_taken() -> None:
    rows = [row(0, ("a", 1.0), ("b", 2.0), ("c", 2.0)), FAILED, row(2, ("x", -1.0), ("y", None))]
    chosen, counts = best_of_n(rows, ["question"], ChoiceSection())
    assert chosen == [
        {"question": "q0", "row_id": 0, "response": "b", "score": 2.0},
        {"question": "q2", "row_id": 2, "response": "x", "score": -1.0},
    ]
    assert counts == {"chosen": 2, "below_min_score": 0, "without_response": 1}


def test_the_best_may_not_be_good_enough() -> None:
    rows = [row(0, ("a", 0.5), (" \n", 9.0)), row(1, ("a", 1.0), ("b", 0.0))]
    chosen, counts = best_of_n(rows, ["question"], ChoiceSection(min_score=1.0))
    assert [made["row_id"] for made in chosen] == [1]
    assert counts == {"chosen": 1, "below_min_score": 1, "without_response": 0}


def test_a_pair_is_best_and_worst() -> None:
    rows = [
        row(0, ("a", 1.0), ("b", 3.0), ("c", -1.0), ("d", 3.0), ("e", -1.0)),
        row(1, ("a", 1.0), ("b", 1.0)),  # a tie
        row(2, ("same", 1.0), ("same", 0.0)),  # a source that contradicts itself
        row(3, ("a", 1.0), ("", 0.0)),  # an empty response cannot be trained on
        row(4, ("a", 1.0), ("b", None)),
        FAILED,
    ]
    pairs, counts = best_and_worst(rows, ["question"], PairSection())
    assert pairs == [
        {
            "question": "q0",
            "row_id": 0,
            "chosen": "b",
            "rejected": "c",
            "score_chosen": 3.0,
            "score_rejected": -1.0,
        }
    ]
    assert counts == {"pairs": 1, "ties": 2, "too_few_responses": 3}


def test_a_small_margin_is_a_tie() -> None:
    rows = [row(0, ("a", 0.0), ("b", 0.5)), row(1, ("a", 0.0), ("b", 0.75))]
    pairs, counts = best_and_worst(rows, ["question"], PairSection(min_margin=0.5))
    assert [pair["row_id"] for pair in pairs] == [1] and counts["ties"] == 1


def test_truncated_responses_can_be_left_out() -> None:
    rows = [row(0, ("a", 5.0), ("b", 1.0), ("c", 0.0), truncated=0)]
    [pair], _ = best_and_worst(rows, ["question"], PairSection(drop_truncated=True))
    assert (pair["chosen"], pair["rejected"]) == ("b", "c")
    [best], _ = best_of_n(rows, ["question"], ChoiceSection(drop_truncated=True))
    assert best["response"] == "b"
    labels, _ = labelled(rows, ["question"], LabelSection(drop_truncated=True))
    assert [made["response"] for made in labels] == ["b", "c"]


def test_labels_are_rounded() -> None:
    rows = [row(0, ("a", 0.26), ("b", -0.04)), FAILED]
    labels, counts = labelled(rows, ["question"], LabelSection(decimals=1))
    assert [str(made["reward"]) for made in labels] == ["0.3", "0.0"]  # never -0.0
    assert [made["score"] for made in labels] == [0.26, -0.04]
    assert counts == {"labelled": 2, "without_response": 1}


def test_labels_are_normalised_over_all_rows() -> None:
    rows = [row(0, ("a", 1.0), ("b", 3.0)), row(1, ("c", 5.0), ("d", 7.0))]
    labels, _ = labelled(rows, ["question"], LabelSection(normalize=True, decimals=2))
    # Mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
    assert [made["reward"] for made in labels] == [-1.34, -0.45, 0.45, 1.34]
    equal, _ = labelled([row(0, ("a", 2.0), ("b", 2.0))], ["question"], LabelSection(normalize=True))
    assert [made["reward"] for made in equal] == [0.0, 0.0]


def test_a_single_response_has_its_own_columns() -> None:
    single = {"question": "q", "row_id": 0, "response": "a", "score": 2.0, "truncated": False}
    labels, _ = labelled([single], ["question"], LabelSection())
    assert [(made["response"], made["reward"]) for made in labels] == [("a", 2.0)]
