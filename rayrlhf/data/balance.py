"""Balanced partitioning of work. Pure and deterministic: sizes in, indices out."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

Members = tuple[int, ...]  # indices of the items in a part
# Per part, heaviest first: minus its excess over the lightest; and its members.
Partition = tuple[tuple[int, ...], tuple[Members, ...]]


def balanced_partition(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Splits items of `sizes` [n] into `parts` lists of indices whose sums are nearly equal.

    The largest differencing method (Karmarkar & Karp 1982, "The Differencing Method of Set Partitioning", UC
    Berkeley CSD-82-113) for any number of parts: every item starts as a separate partition, and the two
    partitions with the largest spread are merged, the heaviest part of one with the lightest of the other,
    until one is left: n - 1 merges of `parts` sums each. The largest sum is at most 4/3 - 1/(3·parts) of the
    best possible (Michiels et al. 2007, Theory Comput. Syst. 41) and usually much closer; sums never differ
    by more than the largest size.

    Every index occurs once, ascending within a part; parts are ordered by their first index and empty ones,
    if there are fewer items than parts, are last. The order of `sizes` does not change the sums. Raises
    `ValueError` for `parts` below 1 and for a negative size.
    """
    if parts < 1:
        raise ValueError(f"cannot split into {parts} parts; wanted at least 1")
    for index, size in enumerate(sizes):
        if size < 0:
            raise ValueError(f"item {index} has the size {size}; wanted at least 0")
    # The heap orders partitions by their spread, then by their other sums. Indices are compared only if all
    # sums are equal, and then the order has no effect on the sums.
    no_members: Members = ()
    partitions: list[Partition] = [
        ((-size, *[0] * (parts - 1)), ((index,), *[no_members] * (parts - 1)))
        for index, size in enumerate(sizes)
    ]
    heapify(partitions)
    while len(partitions) > 1:
        heappush(partitions, _merge(heappop(partitions), heappop(partitions)))
    members = partitions[0][1] if partitions else [no_members] * parts
    return sorted((sorted(part) for part in members), key=lambda part: (not part, part))


def _merge(one: Partition, other: Partition) -> Partition:
    """Merge the heaviest part of one with the lightest of the other, and so on inwards."""
    merged = sorted(
        zip(
            [a + b for a, b in zip(one[0], reversed(other[0]), strict=True)],
            [a + b for a, b in zip(one[1], reversed(other[1]), strict=True)],
            strict=True,
        )
    )
    lightest = merged[-1][0]
    return tuple(excess - lightest for excess, _ in merged), tuple(members for _, members in merged)
