"""Metrics of micro-batches, ranks and optimizer steps become those of the training step."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rayrlhf.algorithms.metrics import ExplainedVariance, Max, Mean, Metrics, Sum, step_mean, token_mean
from rayrlhf.config.train import TrainConfig
from rayrlhf.observe.metrics import check_keys

# What two optimizer steps measure: over 2 and over 6 loss tokens.
FIRST = Metrics(
    {
        "loss/ptx": Mean(15.0, 5.0),
        "rollout/logprob_diff_max": Max(0.25),
        "rollout/logprob_diff_mean": Mean(3.0, 2.0),
        "kl/mean": Mean(1.5, 2.0),
    }
)
SECOND = Metrics(
    {
        "loss/ptx": Mean(10.0, 5.0),
        "rollout/logprob_diff_max": Max(0.125),
        "rollout/logprob_diff_mean": Mean(1.0, 6.0),
        "kl/mean": Mean(0.5, 6.0),
    }
)


class ScriptedEngine:
    """A DeepSpeed engine of one weight, whose gradient norms are given."""

    def __init__(self, norms: list[float]) -> None:
        self.module = nn.Linear(1, 1)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        self.norms = norms

    def train(self) -> None: ...

    def backward(self, share: Tensor, *, scale_wrt_gas: bool) -> None:
        share.backward()

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float:
        return self.norms.pop(0)


def update(
    engine: ScriptedEngine,
    objectives: list[float],
    measured: list[Metrics],
    weight: float,
    name: str = "actor",
) -> Metrics:
    """What the learner `name` returns of an optimizer step over these micro-batches."""
    from rayrlhf.train.learner import Learner, Term

    learner = object.__new__(Learner)  # without DeepSpeed
    learner.name, learner.engine, learner.base_lr, learner.first_step = name, engine, 1e-6, 0
    learner.train, learner.bad_steps_in_a_row = TrainConfig(num_steps=10, max_bad_steps=5), 0
    batches: list[Any] = list(range(len(objectives)))

    def forward(module: Any, number: int) -> Tensor:
        return objectives[number] + 0.0 * module.module.weight.sum()

    def loss(output: Tensor, number: int) -> tuple[Tensor, Metrics]:
        return output, measured[number]

    return learner.update(Term(batches, forward, loss), step=0, weight=weight)


def test_10_by_hand() -> None:
    engine = ScriptedEngine([2.0, math.inf])
    few = update(engine, [0.5], [FIRST], weight=2.0)
    many = update(engine, [-1.0], [SECOND], weight=6.0)
    found = (few + many).results()
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
    # By sequences, 2 and 1, where these are what the objective is a mean over.
    engine = ScriptedEngine([2.0, 2.0])
    by_sequences = update(engine, [0.5], [FIRST], weight=2.0) + update(engine, [-1.0], [SECOND], weight=1.0)
    assert by_sequences.results()["loss/actor"] == pytest.approx((0.5 * 2 - 1.0) / 3)


def test_10_a_step_of_several_micro_batches() -> None:
    """Shares of the objective add up to it; means are over what all micro-batches have."""
    found = update(ScriptedEngine([2.0]), [0.5, -1.0], [FIRST, SECOND], weight=8.0)
    assert found["loss/actor"] == Mean(-0.5 * 8, 8.0)
    assert found["kl/mean"] == Mean(2.0, 8.0)
    assert found["rollout/logprob_diff_max"] == Max(0.25)
    assert found["loss/actor_grad_norm"] == Mean(2.0, 1.0)
    assert found["loss/actor_bad_steps"] == Sum(0.0)


def test_10_only_skipped_steps_have_no_gradient_norm() -> None:
    found = update(ScriptedEngine([math.inf]), [0.5], [FIRST], weight=2.0, name="critic").results()
    assert "loss/critic_grad_norm" not in found
    assert found["loss/critic_bad_steps"] == 1.0 and found["loss/critic"] == 0.5


def test_10_what_has_no_token_contributes_nothing() -> None:
    nothing = Metrics({"kl/mean": Mean(0.0, 0.0), "rollout/logprob_diff_max": Max(0.0)})
    one = Metrics({"kl/mean": Mean(3.0, 6.0), "rollout/logprob_diff_max": Max(0.5)})
    assert (one + nothing).results() == one.results() == (nothing + one).results()
    assert one.results() == {"kl/mean": 0.5, "rollout/logprob_diff_max": 0.5}
    assert "kl/mean" not in nothing.results(), "a mean over nothing is no 0"
    assert Metrics().results() == {}


def test_10_the_explained_variance_is_of_all_returns() -> None:
    """Returns 0, 2 and 4 in two mini-batches, values 1, 1 and 4: residuals -1, 1 and 0.
    1 - (2/3)/(8/3) = 0.75; the second alone has returns without variance.
    """
    first = Metrics({"loss/explained_variance": ExplainedVariance((2.0, 2.0, 4.0, 0.0, 2.0))})
    second = Metrics({"loss/explained_variance": ExplainedVariance((1.0, 4.0, 16.0, 0.0, 0.0))})
    assert (first + second).results()["loss/explained_variance"] == pytest.approx(0.75)
    assert math.isnan(second.results()["loss/explained_variance"])
    assert (Metrics() + first).results() == first.results(), "an actor's metrics have none"


def test_kinds_do_not_mix() -> None:
    with pytest.raises(TypeError, match="metric kl/mean is a Mean and a Sum"):
        Metrics({"kl/mean": Mean(1.0, 1.0)}) + Metrics({"kl/mean": Sum(1.0)})


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
    assert step_mean(4.0).merged(step_mean(1.0)).result() == 2.5


mini_batches = st.lists(
    st.lists(st.floats(-3, 3, allow_nan=False), min_size=0, max_size=5), min_size=1, max_size=6
)


@given(mini_batches, st.data())
def test_10_any_split_and_order_gives_the_mean_over_all_tokens(
    parts: list[list[float]], data: st.DataObject
) -> None:
    def of(values: list[float]) -> Metrics:
        measured = {"kl/mean": Mean(sum(values), float(len(values)))}
        return Metrics(measured | {"loss/is_weight_max": Max(max(values))} if values else {})

    order = data.draw(st.permutations(parts))
    found = reduce(add, map(of, order), Metrics()).results()
    every = [value for part in parts for value in part]
    if not every:
        assert "kl/mean" not in found
        return
    assert found["kl/mean"] == pytest.approx(sum(every) / len(every), abs=1e-9)
    assert found["loss/is_weight_max"] == max(every)
