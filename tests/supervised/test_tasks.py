"""The bookkeeping of tasks: means over examples, and padding that weighs nothing."""

from __future__ import annotations

import pytest
import torch

from rayrlhf.algorithms.metrics import Mean, Metrics
from rayrlhf.batch import ExampleBatch, pack_examples, padding_examples
from rayrlhf.config.base import ConfigError
from rayrlhf.config.train import SupervisedTrainConfig
from rayrlhf.samples import Example, TokenSequence
from rayrlhf.supervised.task import (
    Measured,
    Objective,
    Task,
    example_ids,
    mean_over,
    pack_evenly,
    real_examples,
    total_weight,
)
from rayrlhf.train.collectives import Ranks


def test_means_of_sums() -> None:
    measured = Metrics({"loss/model": Mean(3.0, 1.0), "reward/margin": Mean(6.0, 4.0)})
    assert measured.results() == {"loss/model": 3.0, "reward/margin": 1.5}


def test_a_mean_over_nothing_is_left_out() -> None:
    assert Metrics({"reward/accuracy": Mean(0.0, 0.0)}).results() == {}


def test_summed_and_picked() -> None:
    mean = mean_over(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert mean.summed() == Mean(4.0, 2.0)
    assert Metrics({"loss/nll": mean.summed()}).results() == {"loss/nll": pytest.approx(2.0)}


def test_no_gradient_in_metrics() -> None:
    value = torch.ones(1, requires_grad=True)
    assert not torch.as_tensor(Mean(value * 2, torch.ones(1)).summed().total).requires_grad


class Squares(Task):
    """An example's loss is the square of its value, and weighs as much as it has loss tokens."""

    def __init__(self) -> None: ...

    def weights(self, batch: ExampleBatch) -> torch.Tensor:
        return torch.tensor([float(batch.loss_mask.sum())])

    def measure(self, output: torch.Tensor, batch: ExampleBatch) -> Measured:
        weights = self.weights(batch)
        squares = Mean(output.square() * weights, weights)
        return Measured(squares, {"loss/nll": squares})


class ThreeMore(Ranks):
    """Another rank has loss tokens of weight 3, and three micro-batches."""

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        return values + 3.0

    def max(self, value: float) -> float:
        return max(value, 3.0)


def test_an_objective_is_a_mean_over_the_examples_of_all_ranks() -> None:
    examples = [
        Example(0, (TokenSequence([5, 6], [0, 1]),)),
        Example(1, (TokenSequence([5, 6, 7], [0, 1, 1]),)),
    ]
    batches = [pack_examples([example]) for example in examples]
    total = total_weight(Squares(), [*batches, padding_examples(1)], ThreeMore())
    assert total == 1 + 2 + 0 + 3
    objective = Objective(Squares(), total)
    value = torch.tensor([3.0], requires_grad=True)
    share, metrics = objective(value, batches[1])
    share.backward()
    # 3² · 2 / 6, whose slope is 2 · 3 · 2 / 6
    assert share.item() == pytest.approx(3.0)
    assert value.grad is not None and value.grad.item() == pytest.approx(2.0)
    assert metrics == {"loss/nll": Mean(18.0, 2.0)}
    nll = metrics["loss/nll"]
    assert isinstance(nll, Mean) and not torch.as_tensor(nll.total).requires_grad
    assert total_weight(Squares(), [padding_examples(1)], Ranks()) == 1.0, "nothing to divide by"


def test_ranks_with_fewer_examples_add_padding() -> None:
    batches = pack_evenly([Example(4, (TokenSequence([5, 6], [0, 1]),))], ThreeMore(), budget_tokens=8)
    assert [example_ids(batch, 1).tolist() for batch in batches] == [[4], [-1], [-1]]
    assert [example_ids(batch, 1).tolist() for batch in pack_evenly([], Ranks(), budget_tokens=8)] == [[-1]]


def test_padding_is_no_example() -> None:
    assert example_ids(padding_examples(2), 2).tolist() == [-1]
    assert real_examples(padding_examples(2), 2).tolist() == [0.0]
    pair = (TokenSequence([5, 6], [0, 1]), TokenSequence([5, 7, 8], [0, 1, 1]))
    batch = pack_examples([Example(3, pair, value=0.5), Example(9, pair)])
    assert example_ids(batch, 2).tolist() == [3, 9]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 10]
    assert batch.example_values.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2]


def test_a_warm_up_must_end_within_the_steps_that_the_data_make() -> None:
    train = SupervisedTrainConfig(samples_per_step=16, num_epochs=2, warmup_ratio=0.5)
    known = train.with_steps(40)  # 80 samples are read
    assert (known.num_steps, known.warmup_steps, known.total_steps) == (5, 2, 5)
    with pytest.raises(ConfigError, match="6 for 40 rows, which are 5 steps"):
        SupervisedTrainConfig(samples_per_step=16, num_epochs=2, warmup_steps=6).with_steps(40)


def test_a_mask_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 4 has 2 tokens, 1 mask"):
        pack_examples([Example(4, (TokenSequence([5, 6], [1]),))])
