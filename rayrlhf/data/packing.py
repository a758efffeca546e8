"""Packs sequences into micro-batches and balances work over ranks. Pure: lengths in, indices out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import TypeVar

T = TypeVar("T")
MOST_MERGED_SUMS = 1_000_000  # items x parts of the differencing method, of 0.4 us each
Members = tuple[int, ...]  # indices of the items in a part
# Per part, heaviest first: minus its excess over the lightest; and its members.
Partition = tuple[tuple[int, ...], tuple[Members, ...]]


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


def rows_of_group(lengths: Sequence[int], shared: int) -> int:
    """Rows computed for sequences of `lengths` tokens that share their first `shared` ones."""
    return sum(lengths) - shared * (len(lengths) - 1)


def micro_batches_of_groups(
    lengths: Sequence[int], groups: Sequence[Sequence[int]], shared: Sequence[int], budget_tokens: int
) -> list[list[int]]:
    """`micro_batches` that compute at most `budget_tokens` rows and keep groups together, whose sequences
    share a prefix.

    `groups` [G] have indices into `lengths` [S], each once, and `shared` [G] the tokens of each group's
    prefix, 0 if it has none. A group of more rows than the budget is split into parts that have fewer, each
    with the prefix. The sequences of a group are next to each other, in the group's order.
    """
    parts: list[list[int]] = []
    rows: list[int] = []
    for group, prefix in zip(groups, shared, strict=True):
        split = [list(group)]
        if rows_of_group([lengths[i] for i in group], prefix) > budget_tokens:
            rest = micro_batches([lengths[i] - prefix for i in group], budget_tokens - prefix)
            split = [[group[i] for i in part] for part in rest]
        parts += split
        rows += [rows_of_group([lengths[i] for i in part], prefix) for part in split]
    return [[i for part in batch for i in parts[part]] for batch in micro_batches(rows, budget_tokens)]


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


def balanced_partition(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Splits items of `sizes` [n] into `parts` lists of indices whose sums are nearly equal.

    The largest differencing method (Karmarkar & Karp 1982, "The Differencing Method of Set Partitioning", UC
    Berkeley CSD-82-113) for any number of parts: every item starts as a separate partition, and the two
    partitions with the largest spread are merged, the heaviest part of one with the lightest of the other,
    until one is left: n - 1 merges of `parts` sums each. The largest sum is at most 4/3 - 1/(3·parts) of the
    best possible (Michiels et al. 2007, Theory Comput. Syst. 41) and usually much closer; sums never differ
    by more than the largest size. With many items and parts, whose merges take n · `parts` steps (13 s for
    64,000 items and 512 parts), items go to the lightest part in the order of their sizes instead (Graham
    1969, the same bounds): then there are hundreds of small ones per part, which even the sums out.

    Every index occurs once, ascending within a part; parts are ordered by their first index and empty ones,
    if there are fewer items than parts, are last. The order of `sizes` does not change the sums. Raises
    `ValueError` for `parts` below 1 and for a negative size.
    """
    if parts < 1:
        raise ValueError(f"cannot split into {parts} parts; wanted at least 1")
    for index, size in enumerate(sizes):
        if size < 0:
            raise ValueError(f"item {index} has the size {size}; wanted at least 0")
    if len(sizes) * parts > MOST_MERGED_SUMS:
        return _in_order_of_index(_longest_first(sizes, parts))
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
    return _in_order_of_index(partitions[0][1] if partitions else [no_members] * parts)


def _in_order_of_index(members: Iterable[Iterable[int]]) -> list[list[int]]:
    return sorted((sorted(part) for part in members), key=lambda part: (not part, part))


def _longest_first(sizes: Sequence[int], parts: int) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(parts)]
    lightest = [(0, part) for part in range(parts)]  # a heap
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, part = lightest[0]
        members[part].append(index)
        heapreplace(lightest, (total + sizes[index], part))
    return members


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
