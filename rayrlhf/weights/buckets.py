"""Weights as buckets of raw bytes: how they lie there is known to trainer and engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rayrlhf.models.checkpoint_tensors import CheckpointTensors
from rayrlhf.weights.store import TensorSlice

ALIGNMENT_BYTES = 16
Group = Sequence[CheckpointTensors]


def plan_buckets(
    tensors: Iterable[CheckpointTensors], bucket_bytes: int
) -> Iterator[list[CheckpointTensors]]:
    """Consecutive ones up to `bucket_bytes`; one larger than that gets a bucket of its own."""
    group: list[CheckpointTensors] = []
    size = 0
    for made_together in tensors:
        if group and size + made_together.num_bytes > bucket_bytes:
            yield group
            group, size = [], 0
        group.append(made_together)
        size += made_together.num_bytes
    if group:
        yield group


def lay_out(group: Group) -> list[TensorSlice]:
    """Where each tensor of a bucket lies. ZeRO-3 needs not gather it for that."""
    slices: list[TensorSlice] = []
    end = 0
    for spec in (spec for made_together in group for spec in made_together.specs):
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # a view of another dtype needs an aligned start
        dtype = str(spec.dtype).removeprefix("torch.")
        slices.append(TensorSlice(spec.name, dtype, spec.shape, start, spec.num_bytes))
        end = start + spec.num_bytes
    return slices


def check(slices: Sequence[TensorSlice]) -> None:
    """Before anything is allocated for them. Raises `ValueError` for slices that `lay_out` does not make."""
    end = 0
    for piece in slices:
        dtype = getattr(torch, piece.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{piece.name}: {piece.dtype!r} is no dtype")
        if any(type(length) is not int or length < 0 for length in piece.shape):
            raise ValueError(f"{piece.name}: {piece.shape} is no shape")
        wanted = math.prod(piece.shape) * dtype.itemsize
        if piece.num_bytes != wanted:
            raise ValueError(
                f"{piece.name}: {piece.num_bytes} bytes for {piece.shape} of {piece.dtype}, not {wanted}"
            )
        if piece.offset_bytes < end or piece.offset_bytes >= end + ALIGNMENT_BYTES:
            raise ValueError(f"{piece.name}: lies at {piece.offset_bytes}, the one before ends at {end}")
        if piece.offset_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"{piece.name}: lies at {piece.offset_bytes}, not a multiple of {ALIGNMENT_BYTES}"
            )
        end = piece.offset_bytes + piece.num_bytes


def size_of(slices: Sequence[TensorSlice]) -> int:
    """Bytes of the bucket."""
    return slices[-1].offset_bytes + slices[-1].num_bytes


def fill(flat: Tensor, group: Group, slices: Sequence[TensorSlice]) -> None:
    """Copy the tensors' bytes to where they lie in `flat`, uint8 on any device."""
    tensors = (tensor for made_together in group for tensor in made_together.tensors())
    for tensor, piece in zip(tensors, slices, strict=True):
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes].copy_(raw)


def flatten(group: Group, slices: Sequence[TensorSlice]) -> Tensor:
    """The bucket on the CPU."""
    flat = torch.empty(size_of(slices), dtype=torch.uint8)
    fill(flat, group, slices)
    return flat


def unpack(slices: Sequence[TensorSlice], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The named tensors in a bucket, as views of it."""
    for piece in slices:
        raw = flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes]
        yield piece.name, raw.view(getattr(torch, piece.dtype)).view(piece.shape)
