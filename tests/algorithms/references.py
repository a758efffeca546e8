"""The mathematics of NUMERICS.md a second time, in another way: NumPy in float64, from the formulas.

Nothing is packed or masked here. A sequence is the array of its policy tokens [n], possibly empty, and a
batch is a list of them; what a packed stream has in between does not exist. One function per entry of each
table of `rayrlhf.algorithms`: `test_references.py` compares them, and fails for an entry that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Batch = Sequence[Array]


# Advantages: (scores [S], KL, values, groups [S], settings) -> advantages


def rewards(scores: Array, kl: Batch, kl_coef: float) -> list[Array]:
    result = [-kl_coef * tokens for tokens in kl]
    for sequence, score in zip(result, scores, strict=True):
        sequence[-1:] += score
    return result


def discounted(x: Array, discount: float) -> Array:
    """y_t = x_t + discount·y_{t+1} as the system of equations (I - discount·N)·y = x, N the shift by one."""
    return np.asarray(np.linalg.solve(np.eye(x.size) - discount * np.eye(x.size, k=1), x), np.float64)


def whitened(batch: Batch) -> list[Array]:
    every = np.concatenate(batch)
    if every.size == 0:
        return list(batch)
    return [(x - np.mean(every)) / np.sqrt(np.var(every) + 1e-8) for x in batch]


def gae(r: Batch, values: Batch, gamma: float, lam: float) -> list[Array]:
    deltas = [x + gamma * np.append(v, 0.0)[1:] - v for x, v in zip(r, values, strict=True)]
    return [discounted(delta, gamma * lam) for delta in deltas]


def return_to_go(r: Batch, values: Batch, gamma: float, lam: float) -> list[Array]:
    return [discounted(x, gamma) for x in r]


TOKEN_ADVANTAGES: dict[str, Callable[[Batch, Batch, float, float], list[Array]]] = {
    "gae": gae,
    "reinforce_pp": return_to_go,
}


def centred(scores: Array) -> Array:
    return (np.eye(scores.size) - 1 / scores.size) @ scores


GROUP_ADVANTAGES: dict[str, Callable[[Array], Array]] = {  # of the scores of one group [n]
    "rloo": lambda s: np.array([s[i] - np.mean(np.delete(s, i)) for i in range(s.size)]),
    "grpo": lambda s: centred(s) / (np.std(s, ddof=1) + 1e-6),
    "dr_grpo": centred,
    "reinforce_pp_baseline": centred,
}
WHITENED = {"gae", "reinforce_pp", "reinforce_pp_baseline"}


# Policy losses of one sequence: (logprobs [n] with gradient, logprobs [n] without, old_logprobs, advantages)


def ratios(logprobs: Array, old: Array) -> Array:
    return np.exp(np.clip(logprobs - old, -20, 20))


def clipped(ratio: Array, a: Array, low: float, high: float, dual: float | None) -> Array:
    """By the sign of A: a good token's ratio counts up to 1+ε_high, a bad one's from 1-ε_low (up to c)."""
    bad = np.maximum(ratio, 1 - low)
    return -a * np.where(a >= 0, np.minimum(ratio, 1 + high), bad if dual is None else np.minimum(bad, dual))


def ppo(new: Array, held: Array, old: Array, a: Array, low: float, high: float, dual: float | None) -> Array:
    return clipped(ratios(new, old), a, low, high, dual)


def gspo(new: Array, held: Array, old: Array, a: Array, low: float, high: float, dual: float | None) -> Array:
    """The ratio of the sequences' likelihoods, to the power of 1/length, times each token's π/sg(π)."""
    ratio = ratios(np.array([np.sum(held) / held.size]), np.array([np.sum(old) / held.size]))
    return clipped(ratio * np.exp(new) / np.exp(held), a, low, high, dual)


def cispo(
    new: Array, held: Array, old: Array, a: Array, low: float, high: float, dual: float | None
) -> Array:
    return -np.minimum(np.maximum(ratios(held, old), 1 - low), 1 + high) * a * new


def sapo(new: Array, held: Array, old: Array, a: Array, low: float, high: float, dual: float | None) -> Array:
    """By the temperatures of the paper: 1.0 for good tokens, 1.05 for bad ones."""
    tau = np.where(a > 0, 1.0, 1.05)
    return -4 / tau / (1 + np.exp(-tau * (ratios(new, old) - 1))) * a


def reinforce(
    new: Array, held: Array, old: Array, a: Array, low: float, high: float, dual: float | None
) -> Array:
    return -a * new


POLICY_LOSSES: dict[str, Callable[[Array, Array, Array, Array, float, float, float | None], Array]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}


def value_loss(values: Array, old: Array, returns: Array, clip: float | None) -> Array:
    if clip is None:
        return (values - returns) ** 2 / 2
    near = old + np.clip(values - old, -clip, clip)
    return np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


# The rest


AGGREGATIONS: dict[str, Callable[[Batch, float], float]] = {  # (losses, constant length)
    "token_mean": lambda losses, _: float(np.mean(np.concatenate(losses))),
    "sequence_mean": lambda losses, _: float(np.mean([np.mean(x) for x in losses if x.size])),
    "sequence_sum_norm": lambda losses, length: float(
        np.mean([np.sum(x) / length for x in losses if x.size])
    ),
}

KL_ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {
    "k1": lambda new, ref: np.log(np.exp(new) / np.exp(ref)),
    "k2": lambda new, ref: np.log(np.exp(new) / np.exp(ref)) ** 2 / 2,
    "k3": lambda new, ref: np.clip(np.exp(ref) / np.exp(new), np.exp(-10), np.exp(10)) - 1 - (ref - new),
}

ROLLOUT_CORRECTIONS: dict[str, Callable[[Array, float, float], Array]] = {  # of weights [n]
    "truncate": lambda w, low, high: np.minimum(w, high),
    "mask": lambda w, low, high: w * ((w >= low) & (w <= high)),
}

WEIGHT_LEVELS: dict[str, Callable[[Array, Array], Array]] = {
    "token": lambda old, rollout: np.exp(old) / np.exp(rollout),
    "sequence": lambda old, rollout: np.full(old.size, np.prod(np.exp(old)) / np.prod(np.exp(rollout))),
    "geometric": lambda old, rollout: np.full(
        old.size, float(np.prod(np.exp(old) / np.exp(rollout))) ** (1 / max(1, old.size))
    ),
}

# The coefficient after a run: (coefficient, target, horizon, KL of each step [n], samples of each step [n])
KL_CONTROLLERS: dict[str, Callable[[float, float, int, Array, Array], float]] = {
    "FixedKL": lambda coef, target, horizon, kl, n: coef,
    "AdaptiveKL": lambda coef, target, horizon, kl, n: float(
        np.exp(np.log(coef) + np.sum(np.log1p(np.clip(kl / target - 1, -0.2, 0.2) * n / horizon)))
    ),
}
