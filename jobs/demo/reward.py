"""The demo's reward: how cheerful a response sounds, by the VADER lexicon (Hutto and Gilbert, ICWSM 2014).

It shows the shape of a user reward function: in the config,
`reward.sources: [{type: function, function: "jobs.demo.reward:sentiment"}]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

MIN_WORDS = 5  # shorter responses are not the sentence that was asked for
MIN_DISTINCT_SHARE = 0.6  # ordinary English of up to about 60 words stays above it
MAX_SENTIMENT_SHARE = 0.5  # a sentence has other words too; a list of cheerful words has not

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def sentiment(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **columns: Any
) -> list[float]:
    """One score in [-1, 1] per response; prompts, labels and the other columns of the data set are not looked
    at.

    score = quality · (compound + 1) - 1, where compound in [-1, 1] is VADER's and quality in [0, 1] is 1 for
    an ordinary sentence. Lost quality thus always costs, also where compound is negative: an empty response
    gets -1, not the 0 that would beat an honest gloomy sentence.
    """
    return [score(response) for response in responses]


def score(response: str) -> float:
    compound: float = _analyzer().polarity_scores(response)["compound"]
    return quality(response) * (compound + 1.0) - 1.0


def quality(response: str) -> float:
    """In [0, 1]; below 1 for what raises VADER's score without being a sentence.

    The product of three factors, each 1 in ordinary text: length (at least `MIN_WORDS`), variety (the share
    of distinct words, against "happy happy happy") and plainness (the share of words outside the lexicon,
    against a list of cheerful words).
    """
    words = [word.lower() for word in WORD.findall(response)]
    if not words:
        return 0.0
    lexicon = _analyzer().lexicon
    distinct_share = len(set(words)) / len(words)
    sentiment_share = sum(word in lexicon for word in words) / len(words)
    length = min(1.0, len(words) / MIN_WORDS)
    variety = min(1.0, distinct_share / MIN_DISTINCT_SHARE)
    plainness = min(1.0, (1.0 - sentiment_share) / (1.0 - MAX_SENTIMENT_SHARE))
    return length * variety * plainness


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
