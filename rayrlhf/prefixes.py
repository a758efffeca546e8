"""Shared prefixes: tokens that begin several sequences of a micro-batch are computed once.

The samples of a group have the same prompt, and so have the two answers of a pair. The hidden states of a
prefix depend on its own tokens only, so a decoder computes them once, and each sequence's remaining tokens
attend to the prefix's keys and values and to their own. In the backward pass the gradients of all sequences
add up there. Outputs and gradients are those of the separate sequences.

In addition to the legend of `rayrlhf.batch`: U  rows that a decoder computes, at most T
G  segments: runs of rows in which every row attends to those before it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# Shorter prefixes are not shared: each shared one takes additional calls of the attention kernel.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class SharedPrefixes:
    """The rows that a decoder computes for a packed stream, and the row of each token.

    Two sequences that begin with the same three tokens, of 5 and 4 tokens:

    >>> ids = torch.tensor([1, 12, 9, 28, 2, 1, 12, 9, 30])
    >>> shared = SharedPrefixes.of(torch.tensor([0, 5, 9]), ids, min_tokens=2)
    >>> shared.tokens.tolist(), shared.lengths, shared.prefix_of
    ([0, 1, 2, 3, 4, 8], (3, 2, 1), (-1, 0, 0))
    >>> shared.rows.tolist(), shared.key_rows.tolist()
    ([0, 1, 2, 3, 4, 0, 1, 2, 5], [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5])
    """

    tokens: Tensor  # [U] int64: a token with each row's value; segments one after the other
    rows: Tensor  # [T] int64: the row of each token
    cu_seqlens: Tensor  # [G+1] int32: boundaries of the segments
    lengths: tuple[int, ...]  # [G] rows of each segment
    prefix_of: tuple[int, ...]  # [G] the segment that it continues; -1 if it begins its sequences
    # Keys of each segment: the rows of the segment that it continues, then its own.
    key_rows: Tensor  # [K] int64
    cu_seqlens_k: Tensor  # [G+1] int32: boundaries of the segments' keys

    @property
    def num_rows(self) -> int:
        return self.tokens.numel()

    @property
    def longest_keys(self) -> int:
        """Keys of the segment with the most: tokens of the longest sequence."""
        return max(
            length + (self.lengths[prefix] if prefix >= 0 else 0)
            for length, prefix in zip(self.lengths, self.prefix_of, strict=True)
        )

    def to(self, device: torch.device | str) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @staticmethod
    def of(cu_seqlens: Tensor, *inputs: Tensor, min_tokens: int = MIN_SHARED_TOKENS) -> SharedPrefixes | None:
        """The prefixes that consecutive sequences share, on the CPU; None if there are none.

        `inputs` [T, …] are what a decoder computes a token from, such as its id and position: tokens are the
        same if all of them are equal. Each sequence shares at most one prefix, chosen such that the fewest
        rows are computed, and has at least one row of its own.
        """
        bounds = cu_seqlens.tolist()
        num_sequences = len(bounds) - 1
        common = [_common(bounds, index, inputs) for index in range(num_sequences - 1)]
        runs = _best_runs(common, min_tokens)
        if len(runs) == num_sequences:
            return None
        tokens: list[Tensor] = []
        prefix_of: list[int] = []
        rows = torch.empty(bounds[-1], dtype=torch.int64)
        done = 0

        def add(start: int, stop: int, prefix: int) -> None:
            nonlocal done
            tokens.append(torch.arange(start, stop))
            prefix_of.append(prefix)
            rows[start:stop] = torch.arange(done, done + stop - start)
            done += stop - start

        for first, stop in runs:
            shared = min(common[first : stop - 1], default=0)
            prefix = len(tokens) if shared else -1
            begin = bounds[first]
            if shared:
                add(begin, begin + shared, -1)
            for index in range(first, stop):
                start = bounds[index]
                rows[start : start + shared] = rows[begin : begin + shared]
                add(start + shared, bounds[index + 1], prefix)
        return _assembled(tokens, rows, prefix_of)


def _assembled(tokens: Sequence[Tensor], rows: Tensor, prefix_of: Sequence[int]) -> SharedPrefixes:
    own_rows = torch.arange(sum(map(len, tokens))).split([len(segment) for segment in tokens])
    keys = [
        own if prefix < 0 else torch.cat([own_rows[prefix], own])
        for own, prefix in zip(own_rows, prefix_of, strict=True)
    ]
    return SharedPrefixes(
        tokens=torch.cat(list(tokens)),
        rows=rows,
        cu_seqlens=_boundaries(tokens),
        lengths=tuple(map(len, tokens)),
        prefix_of=tuple(prefix_of),
        key_rows=torch.cat(keys),
        cu_seqlens_k=_boundaries(keys),
    )


def _boundaries(parts: Sequence[Tensor]) -> Tensor:
    lengths = torch.tensor([0, *map(len, parts)])
    return lengths.cumsum(0).to(torch.int32)


def _common(bounds: Sequence[int], index: int, inputs: Sequence[Tensor]) -> int:
    """Length of the longest common prefix of a sequence and the next one, without their last tokens."""
    start, middle, stop = bounds[index : index + 3]
    longest = min(middle - start, stop - middle) - 1
    if longest < 1:
        return 0
    differ = torch.zeros(longest, dtype=torch.bool)
    for each in inputs:
        unequal = each[start : start + longest] != each[middle : middle + longest]
        differ |= unequal.flatten(1).any(1) if unequal.ndim > 1 else unequal
    first = differ.nonzero()
    return int(first[0]) if len(first) else longest


def _best_runs(common: Sequence[int], min_tokens: int) -> list[tuple[int, int]]:
    """Split the sequences into runs (first, stop), each sharing one prefix, that save the most rows.

    `common` [S-1] are the lengths of the common prefixes of neighbours; sequences of a run have the shortest
    of theirs in common.
    """
    num_sequences = len(common) + 1
    saved = [0] * (num_sequences + 1)  # by the best runs of the first sequences
    first_of_run = list(range(-1, num_sequences))
    for stop in range(1, num_sequences + 1):
        saved[stop] = saved[stop - 1]
        first_of_run[stop] = stop - 1
        shortest = common[stop - 2] if stop > 1 else 0
        for first in range(stop - 2, -1, -1):
            shortest = min(shortest, common[first])
            if shortest < min_tokens:
                break
            total = saved[first] + (stop - first - 1) * shortest
            if total > saved[stop]:
                saved[stop], first_of_run[stop] = total, first
    runs: list[tuple[int, int]] = []
    stop = num_sequences
    while stop > 0:
        runs.append((first_of_run[stop], stop))
        stop = first_of_run[stop]
    return runs[::-1]
