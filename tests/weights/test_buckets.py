"""Parameters as raw bytes, decoded here by numpy alone: the engine side needs vLLM."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rayrlhf.models.adapters import Weight
from rayrlhf.models.checkpoint_tensors import CheckpointTensors
from rayrlhf.weights import buckets as bucket
from rayrlhf.weights.buckets import ALIGNMENT_BYTES, TensorSlice, unpack
from rayrlhf.weights.store import Publication, WeightStore

Group = list[Weight]
ITEM_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}


def lay_out(group: Group) -> list[TensorSlice]:
    return bucket.lay_out(list(map(CheckpointTensors.of, group)))


def flatten(group: Group, slices: list[TensorSlice]) -> Tensor:
    return bucket.flatten(list(map(CheckpointTensors.of, group)), slices)


def plan_buckets(parameters: Group, bucket_bytes: int) -> list[Group]:
    planned = bucket.plan_buckets(map(CheckpointTensors.of, parameters), bucket_bytes)
    return [[weight for tensors in group for weight in tensors.weights] for group in planned]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype))


def decode(slices: list[TensorSlice], flat: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors in a bucket. A bfloat16 is the upper half of a float32."""
    decoded: dict[str, np.ndarray] = {}
    for piece in slices:
        raw = flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes].tobytes()
        if piece.dtype == "bfloat16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, np.dtype(piece.dtype))
        decoded[piece.name] = values.reshape(piece.shape)
    return decoded


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()


def test_a_bucket_by_hand() -> None:
    group: Group = [
        Weight("a", parameter(3, dtype=torch.bfloat16)),  # 6 bytes
        Weight("b", parameter(2, 3)),  # 24 bytes, from the next multiple of 16
        Weight("c", parameter(1, dtype=torch.float16)),  # 40 -> 48
    ]
    slices = lay_out(group)
    flat = flatten(group, slices)
    assert slices == [
        TensorSlice("a", "bfloat16", (3,), 0, 6),
        TensorSlice("b", "float32", (2, 3), 16, 24),
        TensorSlice("c", "float16", (1,), 48, 2),
    ]
    assert flat.dtype == torch.uint8 and flat.shape == (50,)
    decoded = decode(slices, flat.numpy())
    for name, tensor, _ in group:
        np.testing.assert_array_equal(decoded[name], as_numpy(tensor))
    for (name, tensor, _), (other, view) in zip(group, unpack(slices, flat), strict=True):
        assert name == other and view.dtype == tensor.dtype and torch.equal(view, tensor)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tensors=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(ITEM_BYTES))),
        min_size=1,
        max_size=12,
    ),
    bucket_bytes=st.integers(1, 400),
)
def test_what_goes_in_comes_out(tensors: list[tuple[list[int], torch.dtype]], bucket_bytes: int) -> None:
    parameters: Group = [
        Weight(f"p{i}", parameter(*shape, dtype=dtype)) for i, (shape, dtype) in enumerate(tensors)
    ]
    decoded: dict[str, np.ndarray] = {}
    for group in plan_buckets(parameters, bucket_bytes):
        slices = lay_out(group)
        flat = flatten(group, slices)
        assert [piece.name for piece in slices] == [name for name, *_ in group]
        assert all(piece.offset_bytes % ALIGNMENT_BYTES == 0 for piece in slices)
        bounds = [(piece.offset_bytes, piece.offset_bytes + piece.num_bytes) for piece in slices]
        assert all(end <= start for (_, end), (start, _) in pairwise(bounds))
        decoded |= decode(slices, flat.numpy())
    assert list(decoded) == [name for name, *_ in parameters]
    for name, tensor, _ in parameters:
        assert decoded[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(decoded[name], as_numpy(tensor))


def test_a_parameter_that_is_a_view_travels_in_its_own_order() -> None:
    transposed = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    assert not transposed.is_contiguous()
    slices = lay_out([Weight("w", transposed)])
    flat = flatten([Weight("w", transposed)], slices)
    assert decode(slices, flat.numpy())["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_bucket_is_a_copy() -> None:
    weight = parameter(4)
    before = weight.detach().clone()
    slices = lay_out([Weight("w", weight)])
    flat = flatten([Weight("w", weight)], slices)
    with torch.no_grad():
        weight.zero_()  # the next optimizer step
    np.testing.assert_array_equal(decode(slices, flat.numpy())["w"], before.numpy())


def names(groups: list[Group]) -> list[list[str]]:
    return [[name for name, *_ in group] for group in groups]


@pytest.mark.parametrize(
    "bucket_bytes, buckets",
    [
        (1000, [["a", "b", "c", "d"]]),
        (200, [["a", "b", "c"], ["d"]]),  # 80 + 80 + 40 = 200, exactly full
        (199, [["a", "b"], ["c", "d"]]),
        (80, [["a"], ["b"], ["c"], ["d"]]),  # d alone exceeds the size and still travels
        (1, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_buckets_by_hand(bucket_bytes: int, buckets: list[list[str]]) -> None:
    parameters: Group = [
        Weight("a", parameter(20)),  # 80 bytes
        Weight("b", parameter(4, 5)),  # 80
        Weight("c", parameter(20, dtype=torch.bfloat16)),  # 40
        Weight("d", parameter(30)),  # 120
    ]
    assert names(plan_buckets(parameters, bucket_bytes)) == buckets


def test_a_partitioned_parameter_counts_whole() -> None:
    """ZeRO-3 leaves an empty tensor in its place, with the shape of the whole in `ds_shape`."""

    def partitioned(numel: int) -> nn.Parameter:
        stub: Any = nn.Parameter(torch.empty(0))
        stub.ds_shape = (numel,)
        return stub

    parameters: Group = [Weight(name, partitioned(size)) for name, size in (("a", 20), ("b", 20), ("c", 1))]
    assert names(plan_buckets(parameters, 100)) == [["a"], ["b", "c"]]


def test_no_parameters_no_buckets() -> None:
    assert plan_buckets([], 100) == []


def test_a_partitioned_parameter_is_laid_out_before_it_is_gathered() -> None:
    stub: Any = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    stub.ds_numel, stub.ds_shape = 6, torch.Size((2, 3))
    assert lay_out([Weight("w", stub)]) == [TensorSlice("w", "bfloat16", (2, 3), 0, 12)]


def test_the_weight_store_counts_publications_and_knows_announced_ones() -> None:
    store = WeightStore()
    assert store.latest() == Publication(0, 0, []) and not store.is_coming(1)
    buckets: Any = ["version 3"]
    assert store.announce(3) == 1
    assert store.is_coming(2) and store.is_coming(3) and not store.is_coming(4)
    store.publish(Publication(1, 3, buckets))
    assert store.latest() == Publication(1, 3, buckets) and not store.is_coming(3)
    assert store.announce(2) == 2, "a trainer restarted from an older checkpoint still gets a higher number"
    assert store.is_coming(2)
