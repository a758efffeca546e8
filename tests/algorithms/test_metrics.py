"""Metrics add up over micro-batches and optimizer steps to those of the training step."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rayrlhf.algorithms.metrics import ExplainedVariance, Max, Mean, Metrics, Sum, token_mean
from rayrlhf.algorithms.value_loss import explained_variance
from rayrlhf.batch import padding_tokens
from rayrlhf.config.train import TrainConfig
from rayrlhf.observe.metric_keys import check_keys
from rayrlhf.policy.losses import LossCounts
from rayrlhf.train.collectives import add_up
from rayrlhf.train.learner import Term
from tests.plain_engine import PlainLearner

FEW, MANY = LossCounts(tokens=2.0, sequences=2.0), LossCounts(tokens=6.0, sequences=1.0)
# Of an optimizer step on `FEW` tokens, and of one on `MANY`; the texts are the same in both.
FIRST = Metrics(
    {
        "loss/ptx": Mean(3.0 * 4, 4.0),
        "rollout/logprob_diff_max": Max(0.25),
        "rollout/logprob_diff_mean": Mean(3.0, 2.0),
        "kl/mean": Mean(1.5, 2.0),
    }
)
SECOND = Metrics(
    {
        "loss/ptx": Mean(2.0 * 4, 4.0),
        "rollout/logprob_diff_max": Max(0.125),
        "rollout/logprob_diff_mean": Mean(1.0, 6.0),
        "kl/mean": Mean(0.5, 6.0),
    }
)


class Weight(nn.Module):
    """A parameter, and 0 with a gradient of 1 by it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.weight - self.weight.detach()


def updated(aggregation: str) -> Metrics:
    """Two optimizer steps of a learner: an objective of 0.5 with a gradient norm of 2, then one of -1 whose
    gradient overflows.
    """
    learner = PlainLearner(Weight(), TrainConfig(num_steps=10, max_grad_norm=0.0), lr=1e-6)

    def step(objective: float, slopes: list[float], metrics: Metrics, counts: LossCounts) -> Metrics:
        def loss(zero: Tensor, _: Any) -> tuple[Tensor, Metrics]:
            for slope in slopes:
                zero = zero * slope
            return objective + zero, metrics

        term = Term([padding_tokens()], lambda engine, _: engine(), loss)
        return learner.update(term, step=0, weight=counts.of_mean(aggregation))

    return step(0.5, [2.0], FIRST, FEW) + step(-1.0, [1e30, 1e30], SECOND, MANY)


def test_10_by_hand() -> None:
    found = updated("token_mean").results()
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
    by_sequences = updated("sequence_mean").results()
    assert by_sequences["loss/actor"] == pytest.approx((0.5 * 2 - 1.0) / 3)


def test_10_micro_batches_of_an_optimizer_step_add_up_to_one_mean() -> None:
    """Shares 0.25, 0.5 and 0 of an objective of 0.75; three tokens' entropies 1, 2 and 6 in two batches, and
    a padding batch without tokens.
    """
    learner = PlainLearner(Weight(), TrainConfig(num_steps=10), lr=0.0)
    entropies = [torch.tensor([9.0, 1.0]), torch.tensor([2.0, 6.0]), torch.tensor([9.0, 9.0])]
    masks = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), torch.zeros(2)]
    parts = iter(zip([0.25, 0.5, 0.0], entropies, masks, strict=True))

    def loss(zero: Tensor, _: Any) -> tuple[Tensor, Metrics]:
        share, entropy, mask = next(parts)
        return zero + share, Metrics(
            {
                "loss/entropy": token_mean(entropy.requires_grad_(), mask),
                "loss/is_weight_max": Max((entropy.detach() * mask).max()),
            }
        )

    measured = learner.update(
        Term([padding_tokens()] * 3, lambda engine, _: engine(), loss), step=0, weight=3.0
    )
    assert measured["loss/actor"] == Mean(0.75 * 3, 3.0)
    assert measured["loss/entropy"] == Mean(9.0, 3.0)
    assert measured["loss/is_weight_max"] == Max(6.0)
    assert measured.results()["loss/entropy"] == 3.0


def test_10_what_has_no_token_contributes_nothing() -> None:
    nothing = Metrics({"kl/mean": Mean(0.0, 0.0), "rollout/logprob_diff_max": Max(0.0)})
    one = Metrics({"kl/mean": Mean(3.0, 6.0), "rollout/logprob_diff_max": Max(0.5)})
    assert (one + nothing).results() == one.results() == (nothing + one).results()
    assert "kl/mean" not in nothing.results(), "a mean over nothing is no 0"
    assert Metrics().results() == {}


def test_10_the_explained_variance_is_of_all_returns() -> None:
    """Returns 0, 2 and 4 in two mini-batches, values 1, 1 and 4: residuals -1, 1 and 0.
    1 - (2/3)/(8/3) = 0.75; the second alone has returns without variance.
    """
    sums = [(2.0, 2.0, 4.0, 0.0, 2.0), (1.0, 4.0, 16.0, 0.0, 0.0)]
    first, second = (Metrics({"loss/explained_variance": ExplainedVariance(s)}) for s in sums)
    assert (first + second).results()["loss/explained_variance"] == pytest.approx(0.75)
    assert math.isnan(second.results()["loss/explained_variance"])
    assert (Metrics() + first).results() == first.results(), "an actor's metrics have none"
    values, returns = torch.tensor([9.0, 1.0, 1.0]), torch.tensor([9.0, 0.0, 2.0])
    assert explained_variance(values, returns, torch.tensor([0.0, 1.0, 1.0])).sums == sums[0]


mini_batches = st.lists(
    st.lists(st.floats(-3, 3, allow_nan=False), min_size=0, max_size=5), min_size=1, max_size=6
)


@given(mini_batches, st.data())
def test_10_any_split_and_order_gives_the_mean_over_all_tokens(
    parts: list[list[float]], data: st.DataObject
) -> None:
    def of(values: list[float]) -> Metrics:
        if not values:
            return Metrics()
        return Metrics(
            {
                "kl/mean": Mean(sum(values), float(len(values))),
                "loss/is_weight_max": Max(max(values)),
                "loss/actor_bad_steps": Sum(1.0),
            }
        )

    order = data.draw(st.permutations(parts))
    found = reduce(add, map(of, order), Metrics()).results()
    every = [value for part in parts for value in part]
    if not every:
        assert "kl/mean" not in found
        return
    assert found["kl/mean"] == pytest.approx(sum(every) / len(every), abs=1e-9)
    assert found["loss/is_weight_max"] == max(every)
    assert found["loss/actor_bad_steps"] == sum(bool(part) for part in parts)


def test_a_key_is_one_kind_of_metric() -> None:
    with pytest.raises(TypeError, match="metric kl/mean is a Mean and a Sum"):
        _ = Metrics({"kl/mean": Mean(1.0, 1.0)}) + Metrics({"kl/mean": Sum(1.0)})


def test_adding_up_changes_neither_summand() -> None:
    first, second = Metrics({"loss/actor_lr": Mean(1.0, 1.0)}), Metrics({"loss/actor_lr": Mean(3.0, 1.0)})
    total = Metrics()
    total += first
    total += second
    assert total == {"loss/actor_lr": Mean(4.0, 2.0)}
    assert first == {"loss/actor_lr": Mean(1.0, 1.0)} and second == {"loss/actor_lr": Mean(3.0, 1.0)}


def test_tensors_become_plain_numbers_and_over_ranks_every_kind_stays_its_own() -> None:
    metrics = Metrics(
        {
            "loss/entropy": Mean(torch.tensor(6.0), torch.tensor(4.0)),
            "rollout/logprob_diff_max": Max(torch.tensor(0.5)),
            "data/empty_mini_batches": Sum(torch.tensor(2.0)),
            "loss/explained_variance": ExplainedVariance((2.0, 2.0, 4.0, 0.0, 2.0)),
        }
    )
    plain = metrics.on_host()
    assert plain == {
        "loss/entropy": Mean(6.0, 4.0),
        "rollout/logprob_diff_max": Max(0.5),
        "data/empty_mini_batches": Sum(2.0),
        "loss/explained_variance": ExplainedVariance((2.0, 2.0, 4.0, 0.0, 2.0)),
    }
    assert not any(isinstance(n, Tensor) for metric in plain.values() for n in vars(metric).values())
    assert add_up(plain) == plain, "of a single rank"


def test_numbers_per_example_are_summed_without_gradient() -> None:
    margins = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    summed = Mean(margins * torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])).summed()
    assert isinstance(summed.total, Tensor) and not summed.total.requires_grad
    assert summed.result() == 2.0


def test_kinds_do_not_mix() -> None:
    with pytest.raises(TypeError, match="metric kl/mean is a Mean and a Sum"):
        add(Metrics({"kl/mean": Mean(1.0, 1.0)}), Metrics({"kl/mean": Sum(1.0)}))


def test_adding_leaves_both_addends_alone() -> None:
    total = first = Metrics({"kl/mean": Mean(1.0, 1.0)})
    total += Metrics({"kl/mean": Mean(3.0, 1.0), "loss/entropy": Mean(1.0, 1.0)})
    assert total.results() == {"kl/mean": 2.0, "loss/entropy": 1.0}
    assert first == {"kl/mean": Mean(1.0, 1.0)}


def test_on_the_host_there_are_plain_numbers() -> None:
    measured = Metrics(
        {
            "kl/mean": Mean(torch.tensor(3.0), torch.tensor(2.0)),
            "rollout/logprob_diff_max": Max(torch.tensor(0.5)),
            "data/empty_mini_batches": Sum(torch.tensor(2.0)),
            "loss/explained_variance": ExplainedVariance((1.0, 4.0, 16.0, 0.0, 0.0)),
        }
    )
    assert measured.on_host() == {
        "kl/mean": Mean(3.0, 2.0),
        "rollout/logprob_diff_max": Max(0.5),
        "data/empty_mini_batches": Sum(2.0),
        "loss/explained_variance": ExplainedVariance((1.0, 4.0, 16.0, 0.0, 0.0)),
    }
    on_host = measured.on_host()["kl/mean"]
    assert isinstance(on_host, Mean) and type(on_host.total) is type(on_host.weight) is float


def test_a_mean_over_loss_tokens() -> None:
    per_token = torch.tensor([math.nan, 1.0, 2.0, math.inf], requires_grad=True)
    mean = token_mean(per_token, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert mean == Mean(3.0, 2.0) and mean.result() == 1.5
    assert not torch.as_tensor(mean.total).requires_grad
    assert Mean(4.0, 1.0).merged(Mean(1.0, 1.0)).result() == 2.5, "of two optimizer steps"
