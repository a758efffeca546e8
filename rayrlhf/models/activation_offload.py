"""Keeps the inputs of checkpointed layers in host memory for the backward pass (`train.activation_offload`).

With activation checkpointing these inputs, one [T, H] per layer, are what a forward pass leaves behind. On a
GPU each is copied to pinned memory on a separate stream, while the layer computes. In the backward pass, a
layer that takes its input back starts the copy for the layer before it, which is next; the input of the last
layer, which is needed first, stays. On a CPU the copies are made at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rayrlhf.models.streams import decoder_layers

ATTRIBUTE = "activation_offload"  # of a layer: its `Offload`


class Kept:
    """A layer's input: on the host, on the device, or on the way back."""

    def __init__(self, device: torch.device, before: weakref.ref[Kept] | None) -> None:
        self.device = device
        self.before = before  # of the layer before, which needs its input next
        self.on_host: Tensor | None = None
        self.on_device: Tensor | None = None
        self.arrival: Any = None  # event: the copy to the device is done


class Transfers:
    """Copies between a device and host memory, for all layers of a model."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._newest: weakref.ref[Kept] | None = None
        self.num_out = self.num_back = 0

    def keep(self, tensor: Tensor, *, stays: bool) -> Kept:
        kept = Kept(tensor.device, self._newest)
        self._newest = weakref.ref(kept)
        if stays:
            kept.on_device = tensor
            return kept
        self.num_out += 1
        pinned = tensor.device.type == "cuda"
        kept.on_host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        if not pinned:
            kept.on_host.copy_(tensor)
            return kept
        stream = self._stream_of(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # which computes the tensor
        with torch.cuda.stream(stream):
            kept.on_host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before it is copied
        return kept

    def take(self, kept: Kept) -> Tensor:
        """The tensor on its device; the copy of the one before it starts."""
        self._fetch(kept)
        before = kept.before() if kept.before is not None else None
        if before is not None and kept.device.type == "cuda":
            self._fetch(before)
        tensor = kept.on_device
        assert tensor is not None
        if kept.arrival is not None:
            current = torch.cuda.current_stream(kept.device)
            current.wait_event(kept.arrival)
            tensor.record_stream(current)
        if kept.on_host is not None:  # a second backward pass through the graph copies it again
            kept.on_device = kept.arrival = None
        return tensor

    def _fetch(self, kept: Kept) -> None:
        if kept.on_device is not None:
            return
        assert kept.on_host is not None
        self.num_back += 1
        if kept.device.type != "cuda":
            kept.on_device = kept.on_host.clone()
            return
        stream = self._stream_of(kept.device)
        with torch.cuda.stream(stream):  # after its copy to the host, which is on the same stream
            kept.on_device = kept.on_host.to(kept.device, non_blocking=True)
        kept.arrival = stream.record_event()

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class Offload:
    """Of one layer: a context for the call of its checkpointed forward pass."""

    def __init__(self, transfers: Transfers, *, is_last: bool) -> None:
        self.transfers = transfers
        self.is_last = is_last

    def hooks(self) -> saved_tensors_hooks:
        """`transfers` keep what is saved directly inside: the layer's input, by torch's checkpoint, whose own
        hooks handle what the layer saves.
        """
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.dim() < 2 or not tensor.is_floating_point():
            return tensor
        return self.transfers.keep(tensor, stays=self.is_last)

    def _unpack(self, packed: Any) -> Tensor:
        return self.transfers.take(packed) if isinstance(packed, Kept) else packed


def offload_activations(model: nn.Module) -> Transfers:
    """Offload the inputs of the language model's layers, which must be checkpointed already.

    Raises `ValueError` for a model without layers of transformers' form.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"train.activation_offload=true with {type(model).__name__}, whose decoder has no layers of "
            "transformers' form: set train.activation_offload to false"
        )
    transfers = Transfers()
    for layer in layers:
        offload = Offload(transfers, is_last=layer is layers[-1])
        setattr(layer, ATTRIBUTE, offload)
        # Where models.dropout does not set a checkpointing function of its own.
        layer._gradient_checkpointing_func = partial(_offloaded, offload, layer._gradient_checkpointing_func)
    return transfers


def _offloaded(offload: Offload, checkpoint: Callable[..., Any], *inputs: Any) -> Any:
    with offload.hooks():
        return checkpoint(*inputs)
