"""Tensors that move between a GPU and pinned host memory, and what a process holds of the GPU unused."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor


def to_host(tensors: Iterable[Tensor], buffers: list[Tensor], *, pinned: bool) -> None:
    """Move the tensors into these buffers, all copies under way at once; missing buffers are added."""
    moved: list[tuple[Tensor, Tensor]] = []
    for index, tensor in enumerate(tensors):
        if index == len(buffers):
            buffers.append(torch.empty(0))
        if (buffers[index].shape, buffers[index].dtype) != (tensor.shape, tensor.dtype):
            buffers[index] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        if tensor.data_ptr() != buffers[index].data_ptr():
            buffers[index].copy_(tensor.data, non_blocking=pinned)
            moved.append((tensor, buffers[index]))
    if pinned:
        torch.cuda.synchronize()
    for tensor, buffer in moved:
        tensor.data = buffer


def to_device(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move the tensors back. Work on the device that follows waits for the copies."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device, non_blocking=True, copy=True)


def release_cached_memory() -> None:
    """Give back to the GPU what this process no longer uses: blocks that torch caches for later tensors, and
    memory of others that was mapped for a transfer.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
