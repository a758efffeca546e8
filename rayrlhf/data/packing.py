"""Sequence packing into micro-batches. Pure and deterministic: lengths in, indices out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def micro_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Packs sequences of `lengths` tokens [S] into few micro-batches of at most `budget_tokens` tokens each.

    Best-fit decreasing: longest first, each into the fullest micro-batch that still has room; never more than
    11/9 of the fewest possible plus 4 (Johnson et al. 1974, SIAM J. Comput. 3). Returns indices into
    `lengths`, every one once, ascending within a micro-batch; the micro-batches are ordered by their first
    index. Raises `ValueError` for a sequence longer than the budget and for a length below 1.
    """
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sequence {index} has {length} tokens; wanted at least 1")
        if length > budget_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens, more than the micro-batch budget of {budget_tokens}"
            )
    batches: list[list[int]] = []
    rooms: list[
        tuple[int, int]
    ] = []  # (free tokens, micro-batch), ascending: the fullest that fits is found by bisection
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        position = bisect_left(rooms, (length, -1))
        if position == len(rooms):
            batches.append([index])
            free, batch = budget_tokens - length, len(batches) - 1
        else:
            room, batch = rooms.pop(position)
            batches[batch].append(index)
            free = room - length
        if free > 0:
            insort(rooms, (free, batch))
    return sorted(sorted(batch) for batch in batches)


def split_even(items: Sequence[T], parts: int) -> list[list[T]]:
    """Cuts `items` into `parts` contiguous lists whose sizes differ by at most one, the longer ones first.

    Parts are empty when there are fewer items than parts. Raises `ValueError` for `parts` below 1.
    """
    if parts < 1:
        raise ValueError(f"cannot split into {parts} parts; wanted at least 1")
    size, longer = divmod(len(items), parts)
    ends = [size * (part + 1) + min(part + 1, longer) for part in range(parts)]
    starts = [0, *ends[:-1]]
    return [list(items[start:end]) for start, end in zip(starts, ends, strict=True)]
