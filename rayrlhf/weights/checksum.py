"""Checksum of a tensor's bits, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as a signed integer
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def checksum(tensor: Tensor) -> int:
    """Sum of bits_i · weight_i modulo 2^64, as a signed integer. The weights are odd, so it changes with any
    one element, and pseudorandom, so other changes do not cancel.
    """
    bits = tensor.detach().contiguous().view(-1).view(BITS[tensor.element_size()]).to(torch.int64)
    weights = torch.arange(1, len(bits) + 1, device=bits.device) * MULTIPLIER
    weights = (weights ^ (weights >> 31)) * MULTIPLIER | 1
    return int((bits * weights).sum())
