"""Moves a module's weights to host memory for the time of rollouts (`train.offload_weights_between`).

Below ZeRO-3 every rank has all weights, and in ZeRO 1 and 2 they are views of flat buffers, which DeepSpeed
refers to in many places. Therefore the memory of each storage is given back, and all tensors on it stay as
they are. Parameters may be read meanwhile (checkpoints, exports, an engine that starts late): they are views
of the host buffers until the weights come back. On CUDA this has not run yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Piece(NamedTuple):
    """A storage on the device, its bytes there, and its buffer on the host."""

    storage: torch.UntypedStorage
    num_bytes: int
    buffer: Tensor  # uint8


class WeightOffload:
    """The weights of one module; its host buffers are made once."""

    def __init__(self, module: nn.Module, *, pinned: bool) -> None:
        self.module = module
        self.pinned = pinned
        self._buffers: list[Tensor] = []
        self._pieces: list[_Piece] = []  # while the weights are on the host
        self._on_device: list[tuple[nn.Parameter, Tensor]] = []

    def to_host(self) -> int:
        """Returns the bytes freed on the device; 0 if the weights are on the host already."""
        if self._pieces:
            return 0
        index_of: dict[int, int] = {}  # by address of the storage
        views: list[tuple[nn.Parameter, Tensor, int]] = []
        for parameter in self.module.parameters():
            if not parameter.untyped_storage().resizable():  # of a file that was mapped into memory
                parameter.data = parameter.data.clone()
            storage = parameter.untyped_storage()
            if storage.nbytes() == 0:
                continue
            index = index_of.setdefault(storage.data_ptr(), len(index_of))
            if index == len(self._pieces):
                self._pieces.append(_Piece(storage, storage.nbytes(), self._buffer(index, storage.nbytes())))
            views.append((parameter, parameter.data, index))
        for storage, _, buffer in self._pieces:
            buffer.copy_(_bytes_of(storage), non_blocking=self.pinned)
        if self.pinned:
            torch.cuda.synchronize()
        for parameter, view, index in views:
            storage = self._pieces[index].buffer.untyped_storage()
            self._on_device.append((parameter, view))
            on_host = torch.empty(0, dtype=view.dtype)
            parameter.data = on_host.set_(storage, view.storage_offset(), view.size(), view.stride())
        for storage, _, _ in self._pieces:
            storage.resize_(0)
        return sum(piece.num_bytes for piece in self._pieces)

    def to_device(self) -> None:
        """Move them back, with what was written to them meanwhile; a no-op if they are there. Work on the
        device that follows waits for the copies.
        """
        for storage, num_bytes, buffer in self._pieces:
            storage.resize_(num_bytes)
            _bytes_of(storage).copy_(buffer, non_blocking=self.pinned)
        for parameter, view in self._on_device:
            parameter.data = view
        self._pieces, self._on_device = [], []

    def _buffer(self, index: int, num_bytes: int) -> Tensor:
        if index == len(self._buffers):
            self._buffers.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned))
        assert self._buffers[index].numel() == num_bytes, "the module's weights have other storages now"
        return self._buffers[index]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
