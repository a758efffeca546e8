"""Samples laid end to end: every index by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.batch import (
    PackedBatch,
    cu_seqlens_of,
    pack_examples,
    pack_samples,
    pack_values,
    padding_examples,
    padding_samples,
    position_ids_of,
    sequence_ids_of,
)
from rayrlhf.samples import Example, TokenSequence
from tests.samples import make_prompt, make_sample


def set_fields(batch: PackedBatch) -> set[str]:
    """Names of its tensors."""
    return {f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}


def make_example(row_id: int) -> Example:
    return Example(row_id, (TokenSequence([5, 6], [0, 1], [0.0, 1.0]), TokenSequence([5], [0])), value=0.5)


def test_two_samples_by_hand() -> None:
    with_tool_token = make_sample(
        [7, 8, 9], group_id=3, loss_mask=[1, 0, 1], rollout_logprobs=[-0.5, -9.0, -0.25], score=2.0
    )
    short = make_sample([3], prompt=make_prompt([4]), group_id=0, rollout_logprobs=[-1.5], score=-1.0)
    batch = pack_samples([with_tool_token, short])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 7]
    assert batch.loss_mask.tolist() == [0, 0, 1, 0, 1, 0, 1]
    assert batch.scores.tolist() == [2.0, -1.0]
    assert batch.group_ids.tolist() == [3, 0]
    assert batch.rollout_logprobs.tolist() == [0, 0, -0.5, 0, -0.25, 0, -1.5]
    assert (batch.num_tokens, batch.num_sequences) == (7, 2)


def test_dtypes_are_those_of_the_legend() -> None:
    batch = pack_samples([make_sample(score=1)])
    assert {name: getattr(batch, name).dtype for name in set_fields(batch)} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "loss_mask": torch.float32,
        "scores": torch.float32,
        "group_ids": torch.int64,
        "group_advantages": torch.float32,
        "rollout_logprobs": torch.float32,
    }


@pytest.mark.parametrize("unknown", [float("nan"), float("-inf")])
def test_what_a_tool_token_has_for_a_logprob_does_not_matter(unknown: float) -> None:
    batch = pack_samples([make_sample([7, 8], loss_mask=[0, 1], rollout_logprobs=[unknown, -1.0])])
    assert batch.rollout_logprobs.tolist() == [0.0, 0.0, 0.0, -1.0]


def test_a_batch_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        pack_samples([])


def test_unscored_samples_are_named_by_group() -> None:
    samples = [make_sample(group_id=group, score=None if group in (1, 4) else 1.0) for group in range(5)]
    with pytest.raises(ValueError, match=r"groups \[1, 4\] have no score"):
        pack_samples(samples)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_sample_can_be_read_back(lengths: list[tuple[int, int]]) -> None:
    samples = [
        make_sample(range(100, 100 + response), prompt=make_prompt(range(10, 10 + prompt)), score=float(i))
        for i, (prompt, response) in enumerate(lengths)
    ]
    batch = pack_samples(samples)
    bounds = batch.cu_seqlens.tolist()
    for sample, (start, end) in zip(samples, pairwise(bounds), strict=True):
        assert batch.input_ids[start:end].tolist() == [*sample.prompt.prompt_ids, *sample.response_ids]
        assert batch.position_ids[start:end].tolist() == list(range(sample.num_tokens))
        mask = batch.loss_mask[start:end].tolist()
        assert mask == [0] * len(sample.prompt.prompt_ids) + [1] * len(sample.response_ids)
        assert mask[0] == 0, "the first token of a sequence carries no prediction"


def test_boundaries_and_positions() -> None:
    assert cu_seqlens_of([3, 1, 2]).tolist() == [0, 3, 4, 6]
    assert position_ids_of([3, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]
    assert sequence_ids_of(cu_seqlens_of([3, 1, 2])).tolist() == [0, 0, 0, 1, 2, 2]
    assert sequence_ids_of(cu_seqlens_of([2, 0, 1])).tolist() == [0, 0, 2]


def test_a_batch_that_weighs_nothing() -> None:
    batch = padding_samples(token_id=9)
    assert batch.input_ids.tolist() == [9, 9] and batch.position_ids.tolist() == [0, 1]
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert not batch.loss_mask.any()
    assert (batch.group_ids < 0).all()


def test_a_batch_that_weighs_nothing_has_the_fields_of_a_real_one() -> None:
    # A field that only the padding has makes metrics that only its rank has, and the sum over ranks hangs.
    pairs: list[tuple[PackedBatch, PackedBatch]] = [
        (pack_samples([make_sample()]), padding_samples(token_id=0)),
        (pack_examples([make_example(0)]), padding_examples(2)),
    ]
    for real, padding in pairs:
        assert type(padding) is type(real)
        assert set_fields(padding) == set_fields(real)
        for name in set_fields(real):
            assert getattr(padding, name).dtype == getattr(real, name).dtype, name


def test_examples_by_hand() -> None:
    batch = pack_examples([make_example(3), make_example(9)])
    assert batch.input_ids.tolist() == [5, 6, 5, 5, 6, 5]
    assert batch.row_ids.tolist() == [3, 3, 9, 9]
    assert batch.targets.tolist() == [0, 1, 0, 0, 1, 0]
    assert batch.example_values.tolist() == [0.5] * 4


def test_what_a_critic_reads() -> None:
    batch = pack_samples([make_sample([7, 8])])
    values, returns = torch.ones(batch.num_tokens), torch.zeros(batch.num_tokens)
    read = pack_values(batch, values, returns)
    assert set_fields(read) == {"input_ids", "position_ids", "cu_seqlens", "loss_mask", "values", "returns"}
    assert read.values is values and read.returns is returns and read.loss_mask is batch.loss_mask


def test_fields_are_added_to_a_copy() -> None:
    batch = pack_samples([make_sample()])
    values = torch.ones(batch.num_tokens)
    assert replace(batch, values=values).values is values
    assert batch.values is None
    changed: Any = batch
    with pytest.raises(FrozenInstanceError):
        changed.values = values


def test_moving_keeps_what_is_there_and_what_is_not() -> None:
    batch = pack_samples([make_sample()])
    moved = batch.to("meta")
    assert set_fields(moved) == set_fields(batch)
    assert {getattr(moved, name).device.type for name in set_fields(moved)} == {"meta"}
