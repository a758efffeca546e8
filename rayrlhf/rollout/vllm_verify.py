"""Verification of a push: what the engine received and holds, against the trainer's checksums.

Tensors are compared with the trainer's by checksum as they arrive. What became of them is compared by the sum
of all bits: vLLM fuses, permutes and pads them for its kernels, and none of that changes the sum of a
parameter's elements, which is the sum over the tensors that were loaded into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from rayrlhf.weights.checksum import BITS, checksum


class Arrivals:
    """The tensors of one weight update, in one worker."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}  # by name in the checkpoint
        self.sources: dict[str, list[str]] = {}  # by engine parameter: what was loaded into it
        self.sums: dict[str, int] = {}  # by engine parameter: its expected sum of bits
        self.unknown: set[str] = set()  # parameters of which no sum can be expected

    def load(self, model: Any, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors one by one; returns the names of the parameters that they belong to."""
        parameters = dict(model.named_parameters())
        reached: set[str] = set()
        for name, tensor in tensors:
            self.checksums[name] = checksum(tensor)
            loaded = set(model.load_weights([(name, tensor)]))
            reached |= loaded
            for parameter in loaded:
                self.sources.setdefault(parameter, []).append(name)
                if len(loaded) > 1 or parameter not in parameters:
                    self.unknown.add(parameter)
                else:
                    value = tensor.to(parameters[parameter].dtype)
                    self.sums[parameter] = self.sums.get(parameter, 0) + bit_sum(value)
        return reached

    def differences(self, model: Any, wanted: Mapping[str, int], *, is_sharded: bool) -> dict[str, str]:
        """What is wrong with each tensor that is not the trainer's, by its name in the checkpoint.

        Args:
            wanted: the trainer's checksums.
            is_sharded: this worker holds a part of each parameter (tensor parallelism), of which only the
                arrival is compared.
        """
        wrong = dict.fromkeys(wanted.keys() - self.checksums.keys(), "not received")
        wrong |= dict.fromkeys(self.checksums.keys() - wanted.keys(), "not the trainer's")
        for name in wanted.keys() & self.checksums.keys():
            if self.checksums[name] != wanted[name]:
                wrong[name] = "received with other values"
        if is_sharded:
            return wrong
        parameters = dict(model.named_parameters())
        for parameter, expected in self.sums.items():
            if parameter in self.unknown or parameter not in parameters:
                continue
            if (bit_sum(parameters[parameter].detach()) - expected) % 2**64:
                for name in self.sources[parameter]:
                    wrong.setdefault(name, f"received, but {parameter} holds other values")
        return wrong


def bit_sum(tensor: Tensor) -> int:
    """Sum of the elements' bits as integers, modulo 2^64; zeros, as in padding, add nothing."""
    return int(tensor.contiguous().view(-1).view(BITS[tensor.element_size()]).long().sum())
