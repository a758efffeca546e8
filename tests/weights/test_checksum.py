"""Checksums of tensors, computed here with Python's integers."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from rayrlhf.weights.checksum import checksum


def by_hand(values: list[float]) -> int:
    """Of float32 values: their bits as signed integers, weighted, modulo 2^64."""
    bits = [struct.unpack("<i", struct.pack("<f", value))[0] for value in values]
    return signed(sum(weight(index) * each for index, each in enumerate(bits)))


def weight(index: int) -> int:
    multiplied = signed((index + 1) * 0x9E3779B97F4A7C15)
    return signed((multiplied ^ (multiplied >> 31)) * 0x9E3779B97F4A7C15) | 1


def signed(number: int) -> int:
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def test_a_checksum_by_hand() -> None:
    values = [0.5, -1.0, 3.25, 0.0, -7.5, 1e30]
    assert checksum(torch.tensor(values).view(2, 3)) == by_hand(values)
    assert checksum(torch.tensor([1.0], dtype=torch.bfloat16)) == signed(0x3F80 * weight(0))
    assert checksum(torch.empty(0)) == 0


def test_it_changes_with_any_element_and_with_their_order() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        seen = {checksum(tensor)}

        def add(changed: Tensor, seen: set[int] = seen) -> None:
            seen.add(checksum(changed))

        for index in range(tensor.numel()):
            changed = tensor.clone()
            changed.view(-1)[index] *= 1.01  # the next bfloat16 or the one after it
            add(changed)
        add(tensor.flip(0))
        add(tensor.T.contiguous())
        assert len(seen) == 1 + tensor.numel() + 2


def test_a_view_has_the_checksum_of_its_copy() -> None:
    whole = torch.randn(8, 8)
    assert checksum(whole[:4, 2:5]) == checksum(whole[:4, 2:5].clone())
