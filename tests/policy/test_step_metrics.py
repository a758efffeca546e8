"""Metrics of optimizer steps become those of the training step."""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rayrlhf.policy.step_metrics import UpdateMetrics, update_metrics

from rayrlhf.observe.metrics import check_keys
from rayrlhf.policy.losses import StepCounts


def actor(measured: dict[str, float], counts: StepCounts, aggregation: str = "token_mean") -> UpdateMetrics:
    return update_metrics(measured, counts, name="actor", aggregation=aggregation)


FIRST = {
    "loss/actor": 0.5,
    "loss/actor_grad_norm": 2.0,
    "loss/actor_lr": 1e-6,
    "loss/actor_bad_steps": 0.0,
    "loss/ptx": 3.0,
    "rollout/logprob_diff_max": 0.25,
    "rollout/logprob_diff_mean": 3.0,
    "kl/mean": 1.5,
}
SECOND = {
    "loss/actor": -1.0,
    "loss/actor_grad_norm": math.inf,
    "loss/actor_lr": 1e-6,
    "loss/actor_bad_steps": 1.0,
    "loss/ptx": 2.0,
    "rollout/logprob_diff_max": 0.125,
    "rollout/logprob_diff_mean": 1.0,
    "kl/mean": 0.5,
}


def test_10_by_hand() -> None:
    few, many = StepCounts(tokens=2.0, sequences=2.0), StepCounts(tokens=6.0, sequences=1.0)
    found = (actor(FIRST, few) + actor(SECOND, many)).result()
    check_keys(found)
    assert found == pytest.approx(
        {
            "loss/actor": (0.5 * 2 - 1.0 * 6) / 8,
            "loss/actor_grad_norm": 2.0,  # the other one was skipped, and is counted
            "loss/actor_lr": 1e-6,
            "loss/actor_bad_steps": 1.0,
            "loss/ptx": 2.5,  # the same texts in both
            "rollout/logprob_diff_max": 0.25,
            "rollout/logprob_diff_mean": 4.0 / 8,
            "kl/mean": 2.0 / 8,
        }
    )
    by_sequences = actor(FIRST, few, "sequence_mean") + actor(SECOND, many, "sequence_mean")
    assert by_sequences.result()["loss/actor"] == pytest.approx((0.5 * 2 - 1.0) / 3)


def test_10_what_has_no_token_contributes_nothing() -> None:
    nothing = actor({"kl/mean": 0.0, "rollout/logprob_diff_max": 0.0}, StepCounts(0.0, 0.0))
    one = actor({"kl/mean": 3.0, "rollout/logprob_diff_max": 0.5}, StepCounts(6.0, 2.0))
    assert (one + nothing).result() == one.result() == (nothing + one).result()
    assert "kl/mean" not in nothing.result(), "a mean over nothing is no 0"
    assert UpdateMetrics().result() == {}


def test_10_the_explained_variance_is_of_all_returns() -> None:
    """Returns 0, 2 and 4 in two mini-batches, values 1, 1 and 4: residuals -1, 1 and 0.
    1 - (2/3)/(8/3) = 0.75; the second alone has returns without variance.
    """
    counts = StepCounts(1.0, 1.0)
    first = update_metrics(
        {}, counts, name="critic", aggregation="token_mean", returns=(2.0, 2.0, 4.0, 0.0, 2.0)
    )
    second = update_metrics(
        {}, counts, name="critic", aggregation="token_mean", returns=(1.0, 4.0, 16.0, 0.0, 0.0)
    )
    assert (first + second).result()["loss/explained_variance"] == pytest.approx(0.75)
    assert (UpdateMetrics() + first).result() == first.result(), "an actor's metrics have none"


mini_batches = st.lists(
    st.lists(st.floats(-3, 3, allow_nan=False), min_size=0, max_size=5), min_size=1, max_size=6
)


@given(mini_batches, st.data())
def test_10_any_split_and_order_gives_the_mean_over_all_tokens(
    parts: list[list[float]], data: st.DataObject
) -> None:
    def of(values: list[float]) -> UpdateMetrics:
        measured = {"kl/mean": sum(values), "loss/is_weight_max": max(values, default=0.0)}
        return actor(measured if values else {}, StepCounts(float(len(values)), 1.0))

    order = data.draw(st.permutations(parts))
    found = reduce(add, map(of, order), UpdateMetrics()).result()
    every = [value for part in parts for value in part]
    if not every:
        assert "kl/mean" not in found
        return
    assert found["kl/mean"] == pytest.approx(sum(every) / len(every), abs=1e-9)
    assert found["loss/is_weight_max"] == max(every)
