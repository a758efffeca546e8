"""Weights packed into buckets of raw bytes, in a layout that trainer and engine share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rayrlhf.models.checkpoint_tensors import CheckpointTensors, TensorSpec
from rayrlhf.weights.store import TensorSlice

ALIGNMENT_BYTES = 16


class GatheredTensor(NamedTuple):
    """A tensor that this rank holds in full, to be sent under this name."""

    name: str
    tensor: Tensor
    parts: tuple[Tensor, ...] = ()  # nothing to gather

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.name, self.tensor.dtype, tuple(self.tensor.shape)),)

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

    def tensors(self) -> list[Tensor]:
        return [self.tensor]


Sendable = CheckpointTensors | GatheredTensor
Group = Sequence[Sendable]
Kind = TypeVar("Kind", bound=Sendable)


def plan_buckets(tensors: Iterable[Kind], bucket_bytes: int) -> Iterator[list[Kind]]:
    """Group consecutive tensors into buckets of up to `bucket_bytes`; a larger tensor gets its own bucket."""
    group: list[Kind] = []
    size = 0
    for next_tensors in tensors:
        if group and size + next_tensors.num_bytes > bucket_bytes:
            yield group
            group, size = [], 0
        group.append(next_tensors)
        size += next_tensors.num_bytes
    if group:
        yield group


def lay_out(group: Group) -> list[TensorSlice]:
    """Offset and size of each tensor of a bucket. Does not need the tensors gathered under ZeRO-3."""
    slices: list[TensorSlice] = []
    end = 0
    for spec in (spec for tensors in group for spec in tensors.specs):
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # a view of another dtype needs an aligned start
        dtype = str(spec.dtype).removeprefix("torch.")
        slices.append(TensorSlice(spec.name, dtype, spec.shape, start, spec.num_bytes))
        end = start + spec.num_bytes
    return slices


def check(slices: Sequence[TensorSlice]) -> None:
    """Validate slices from another process before allocating for them.

    Raises:
        ValueError: for slices that `lay_out` could not have produced.
    """
    end = 0
    for piece in slices:
        dtype = getattr(torch, piece.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{piece.name}: {piece.dtype!r} is not a dtype")
        if any(type(length) is not int or length < 0 for length in piece.shape):
            raise ValueError(f"{piece.name}: {piece.shape} is not a shape")
        wanted = math.prod(piece.shape) * dtype.itemsize
        if piece.num_bytes != wanted:
            raise ValueError(
                f"{piece.name}: {piece.num_bytes} bytes for {piece.shape} of {piece.dtype}, not {wanted}"
            )
        if piece.offset_bytes < end or piece.offset_bytes >= end + ALIGNMENT_BYTES:
            raise ValueError(
                f"{piece.name}: offset {piece.offset_bytes}, but the previous tensor ends at {end}"
            )
        if piece.offset_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"{piece.name}: offset {piece.offset_bytes} is not a multiple of {ALIGNMENT_BYTES}"
            )
        end = piece.offset_bytes + piece.num_bytes


def size_of(slices: Sequence[TensorSlice]) -> int:
    """Size of the bucket in bytes."""
    return slices[-1].offset_bytes + slices[-1].num_bytes


def fill(flat: Tensor, group: Group, slices: Sequence[TensorSlice]) -> None:
    """Copy the tensors' bytes to their offsets in `flat`.

    Args:
        flat: uint8 [size_of(slices)], on any device.
    """
    tensors = (tensor for part in group for tensor in part.tensors())
    for tensor, piece in zip(tensors, slices, strict=True):
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes].copy_(raw)


def flatten(group: Group, slices: Sequence[TensorSlice]) -> Tensor:
    """The bucket as one tensor on the CPU, uint8 [size_of(slices)]."""
    flat = torch.empty(size_of(slices), dtype=torch.uint8)
    fill(flat, group, slices)
    return flat


def unpack(slices: Sequence[TensorSlice], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of a bucket, as views of it."""
    for piece in slices:
        raw = flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes]
        yield piece.name, raw.view(getattr(torch, piece.dtype)).view(piece.shape)
