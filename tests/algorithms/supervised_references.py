"""The losses of supervised training a second time, in another way: NumPy in float64, one number at a time.

Nothing is a tensor here: a pair is six numbers, a token is two lists of probabilities. One function per entry
of each table; `test_supervised_references.py` compares them, and fails for an entry that has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Pairs: one chosen and one rejected response


class Pair(NamedTuple):
    chosen: float  # Σ log-probs of its tokens
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: float
    rejected_tokens: float


class PairSettings(NamedTuple):
    beta: float
    label_smoothing: float
    gamma: float


def preference(pair: Pair, beta: float) -> float:
    """How sure the policy's implicit rewards make the chosen response's win, by their odds."""
    wins = math.exp(beta * (pair.chosen - pair.ref_chosen))
    loses = math.exp(beta * (pair.rejected - pair.ref_rejected))
    return wins / (wins + loses)


def dpo(pair: Pair, s: PairSettings) -> float:
    return -math.log(preference(pair, s.beta))


def cdpo(pair: Pair, s: PairSettings) -> float:
    """DPO's loss on average, when a share of the pairs is the wrong way round."""
    swapped = Pair(
        pair.rejected,
        pair.chosen,
        pair.ref_rejected,
        pair.ref_chosen,
        pair.rejected_tokens,
        pair.chosen_tokens,
    )
    return (1 - s.label_smoothing) * dpo(pair, s) + s.label_smoothing * dpo(swapped, s)


def ipo(pair: Pair, s: PairSettings) -> float:
    h = pair.chosen - pair.rejected - (pair.ref_chosen - pair.ref_rejected)
    return (h - 1 / (2 * s.beta)) ** 2


def orpo(pair: Pair, s: PairSettings) -> float:
    # The geometric mean of the tokens' probabilities
    chosen = math.exp(pair.chosen) ** (1 / pair.chosen_tokens)
    rejected = math.exp(pair.rejected) ** (1 / pair.rejected_tokens)
    odds_ratio = chosen / (1 - chosen) / (rejected / (1 - rejected))
    return -math.log(chosen) - s.beta * math.log(sigmoid(math.log(odds_ratio)))


def simpo(pair: Pair, s: PairSettings) -> float:
    margin = s.beta / pair.chosen_tokens * pair.chosen - s.beta / pair.rejected_tokens * pair.rejected
    return -math.log(sigmoid(margin - s.gamma))


PREFERENCE_LOSSES: dict[str, Callable[[Pair, PairSettings], float]] = {
    "dpo": dpo,
    "ipo": ipo,
    "cdpo": cdpo,
    "orpo": orpo,
    "simpo": simpo,
}


def implicit_rewards(name: str, pair: Pair, s: PairSettings) -> tuple[float, float]:
    if name in ("orpo", "simpo"):
        return s.beta * pair.chosen / pair.chosen_tokens, s.beta * pair.rejected / pair.rejected_tokens
    return s.beta * (pair.chosen - pair.ref_chosen), s.beta * (pair.rejected - pair.ref_rejected)


def chosen_nll(pair: Pair) -> float:
    return -pair.chosen / pair.chosen_tokens


# Judged responses


def kto_reference_point(mismatched: Sequence[float], ref_mismatched: Sequence[float]) -> float:
    differences = [x - y for x, y in zip(mismatched, ref_mismatched, strict=True)]
    return max(0.0, sum(differences) / len(differences))


def kto(
    log_prob: float, ref: float, desirable: bool, kl: float, beta: float, up: float, down: float
) -> float:
    """λ - v with the paper's value function v (its equation 8)."""
    if desirable:
        return up - up * sigmoid(beta * (log_prob - ref - kl))
    return down - down * sigmoid(beta * (kl - (log_prob - ref)))


# Reward models


def bradley_terry(chosen: float, rejected: float, margin: float) -> float:
    return -math.log(math.exp(chosen - margin) / (math.exp(chosen - margin) + math.exp(rejected)))


def log_exp(chosen: float, rejected: float, margin: float) -> float:
    return math.log(1 + math.exp(rejected - chosen + margin))


REWARD_LOSSES: dict[str, Callable[[float, float, float], float]] = {
    "bradley_terry": bradley_terry,
    "log_exp": log_exp,
}


def prm(bad: float, good: float, target: float) -> float:
    p = math.exp(good) / (math.exp(good) + math.exp(bad))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


# Distillation, of one token: (student's probabilities, teacher's probabilities, beta)


def kl(p: Array, q: Array) -> float:
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def jsd(student: Array, teacher: Array, beta: float) -> float:
    """H(m) - β·H(teacher) - (1-β)·H(student): the same as the two divergences from m."""

    def entropy(p: Array) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    mixture = beta * teacher + (1 - beta) * student
    return entropy(mixture) - beta * entropy(teacher) - (1 - beta) * entropy(student)


DISTILL_LOSSES: dict[str, Callable[[Array, Array, float], float]] = {
    "forward_kl": lambda student, teacher, beta: kl(teacher, student),
    "reverse_kl": lambda student, teacher, beta: kl(student, teacher),
    "jsd": jsd,
}


def probabilities(logits: Array) -> Array:
    weights = np.exp(logits)
    return weights / np.sum(weights)


def merged(p: Array, kept: Sequence[int]) -> Array:
    """The kept outcomes in this order, and all others as one, if there are others."""
    rest = [x for index, x in enumerate(p) if index not in kept]
    return np.array([p[index] for index in kept] + ([sum(rest)] if rest else []))
