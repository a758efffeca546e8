"""The bookkeeping of tasks: means over examples, and fillers that weigh nothing."""

from __future__ import annotations

import pytest
import torch

from rayrlhf.batch import pack_examples, padding_examples
from rayrlhf.config.base import ConfigError
from rayrlhf.config.train import SupervisedTrainConfig
from rayrlhf.samples import Example, TokenSequence
from rayrlhf.supervised.task import Mean, example_ids, mean_over, means_of, real_examples, summed


def test_means_of_sums() -> None:
    told = {"loss/model": 3.0, "reward/margin": 6.0, "reward/margin/weight": 4.0}
    assert means_of(told) == {"loss/model": 3.0, "reward/margin": 1.5}


def test_a_mean_over_nothing_is_left_out() -> None:
    assert means_of({"reward/accuracy": 0.0, "reward/accuracy/weight": 0.0}) == {}


def test_summed_and_picked() -> None:
    mean = mean_over(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    told = {key: value.item() for key, value in summed({"loss/nll": mean}).items()}
    assert means_of(told) == {"loss/nll": pytest.approx(2.0)}


def test_no_gradient_in_metrics() -> None:
    value = torch.ones(1, requires_grad=True)
    assert not summed({"x": Mean(value * 2, torch.ones(1))})["x"].requires_grad


def test_fillers_are_no_examples() -> None:
    assert example_ids(padding_examples(2), 2).tolist() == [-1]
    assert real_examples(padding_examples(2), 2).tolist() == [0.0]
    pair = (TokenSequence([5, 6], [0, 1]), TokenSequence([5, 7, 8], [0, 1, 1]))
    batch = pack_examples([Example(3, pair, value=0.5), Example(9, pair)])
    assert example_ids(batch, 2).tolist() == [3, 9]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 10]
    assert batch.example_values is not None
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
