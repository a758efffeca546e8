"""Checksum of a tensor's bits, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def checksum(tensor: Tensor) -> int:
    """Sum of (2 i + 1) · bits_i modulo 2^64, as a signed integer: changes with any one element, and if two
    different ones are swapped.
    """
    bits = tensor.detach().contiguous().view(-1).view(BITS[tensor.element_size()]).to(torch.int64)
    weights = torch.arange(1, 2 * len(bits) + 1, 2, dtype=torch.int64, device=bits.device)
    return int((bits * weights).sum())
