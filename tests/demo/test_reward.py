"""The demo's reward.

VADER's compound of a text whose valences sum to s is s / sqrt(s² + 15); "good" has the valence 1.9.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.demo.reward import quality, score, sentiment

GOOD = 1.9 / math.sqrt(1.9**2 + 15)  # 0.4404


def test_an_ordinary_sentence_gets_its_compound() -> None:
    assert quality("The garden smells good to me today.") == 1.0
    assert score("The garden smells good to me today.") == pytest.approx(GOOD, abs=1e-4)


def test_a_neutral_sentence_gets_zero() -> None:
    assert score("The table stands in the kitchen of the house.") == pytest.approx(0.0)


@pytest.mark.parametrize("response", ["", "   ", "1234 5678", "...", "\U0001f600\U0001f600 :) :)"])
def test_a_response_without_words_gets_the_worst_score(response: str) -> None:
    assert score(response) == -1.0


def test_a_short_response_loses_in_proportion() -> None:
    # Three of five words: quality 0.6; one of three is in the lexicon, which is plain enough.
    assert score("It is good") == pytest.approx(0.6 * (GOOD + 1) - 1, abs=1e-4)


def test_repetition_loses_in_proportion() -> None:
    # "it is good" four times: 3 distinct of 12 words = 0.25 of the 0.6 that is ordinary.
    assert quality("It is good. " * 4) == pytest.approx(0.25 / 0.6)


def test_one_word_over_and_over_gets_the_worst_score() -> None:
    assert score("happy " * 50) == -1.0


def test_a_list_of_cheerful_words_gets_the_worst_score() -> None:
    assert score("happy wonderful great joyful lovely good") == -1.0


def test_a_gloomy_sentence_beats_an_empty_one_and_a_cheerful_one_beats_both() -> None:
    gloomy = "The broken umbrella was a terrible and sad sight in the rain."
    cheerful = "The broken umbrella made us laugh and we had a wonderful walk in the rain."
    assert score("") < score(gloomy) < 0 < score(cheerful)


def test_one_score_per_response_in_order_and_other_columns_are_welcome() -> None:
    responses = ["", "The garden smells good to me today."]
    scores = sentiment(["p", "q"], responses, [None, None], topic=["a", "b"], mood=["x", "y"])
    assert scores == [score(response) for response in responses]


@given(st.text(max_size=200))
def test_scores_stay_in_range(response: str) -> None:
    assert -1.0 <= score(response) <= 1.0
    assert 0.0 <= quality(response) <= 1.0
