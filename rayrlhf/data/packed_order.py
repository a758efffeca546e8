"""The rows of every step, in micro-batches, as arrays: for orders that depend on the lengths of the rows."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from rayrlhf.storage.run_file import RunFile

ROWS_FILE, ENDS_FILE = "order.npy", "order-ends.npy"
Files = tuple[RunFile, RunFile]
MAX_ROWS = 1 << 26  # of a run, repeats included: half a gigabyte, mapped by workers, and minutes of planning
AT_FETCH = -1  # micro-batch of the rows of a step that is packed when it is fetched


class PackedOrder(Sequence[np.ndarray]):
    """The row ids of each step, and the micro-batch of each row. 9 steps of 3 rows take 27 x 8 bytes.

    >>> order = PackedOrder.of([([4, 0, 2], [[4, 2], [0]]), ([1, 3], None)])
    >>> order[0].tolist(), [pack.tolist() for pack in order.packs(0)], order.packs(1)
    ([4, 2, 0], [[4, 2], [0]], None)
    """

    def __init__(self, rows: np.ndarray, ends: np.ndarray, files: Files | None = None) -> None:
        self.rows = rows  # [2, rows] int32: row ids, and each one's micro-batch within its step or AT_FETCH
        self.ends = ends  # [steps + 1] int64: where each step begins and the last one ends
        self.files = files  # of rows and ends

    @classmethod
    def of(cls, steps: Iterable[tuple[Sequence[int], Sequence[Sequence[int]] | None]]) -> Self:
        """From (rows, micro-batches) per step; None for one that is packed when it is fetched."""
        row_ids, packs_of_rows, ends = array("i"), array("i"), array("q", [0])
        for rows, packs in steps:
            for index, pack in enumerate([rows] if packs is None else packs):
                row_ids.extend(pack)
                packs_of_rows.extend([AT_FETCH if packs is None else index] * len(pack))
            ends.append(len(row_ids))
        both = np.stack([np.frombuffer(part, dtype=np.int32) for part in (row_ids, packs_of_rows)])
        return cls(both, np.frombuffer(ends, dtype=np.int64))

    def saved(self, folder: Path, share: Callable[[str], RunFile] | None = None) -> Self:
        """The same in two files: what is sent to tasks and workers are their paths.

        `share` is called with the name of each file, and returns where all nodes find it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in ((ROWS_FILE, self.rows), (ENDS_FILE, self.ends)):
            partial = folder / f".{name}.partial.npy"
            np.save(partial, values)
            partial.rename(folder / name)
        share = share or (lambda name: RunFile(str(folder.absolute() / name)))
        return type(self).open(share(ROWS_FILE), share(ENDS_FILE))

    @classmethod
    def open(cls, rows: RunFile, ends: RunFile) -> Self:
        return cls(np.load(os.fspath(rows), mmap_mode="r"), np.load(os.fspath(ends)), (rows, ends))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.files is None:
            return type(self), (self.rows, self.ends)
        return type(self).open, self.files

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[step] for step in range(*index.indices(len(self)))]
        return self.rows[0, self._part(index)].astype(np.int64)

    def packs(self, step: int) -> list[np.ndarray] | None:
        """Row ids of each micro-batch of a step, of all ranks; None if it is packed when it is fetched."""
        packs = self.rows[1, self._part(step)]
        if len(packs) and packs[0] == AT_FETCH:
            return None
        return np.split(self[step], np.flatnonzero(np.diff(packs)) + 1)

    def _part(self, index: int) -> slice:
        step = index + len(self) if index < 0 else index
        if not 0 <= step < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        return slice(int(self.ends[step]), int(self.ends[step + 1]))

    def distinct(self) -> np.ndarray:
        """All row ids that occur, in ascending order."""
        return np.unique(self.rows[0]).astype(np.int64)

    def rows_before(self, step: int) -> int:
        """Rows of the steps before this one."""
        return int(self.ends[step])

    @property
    def most_rows(self) -> int:
        """Rows of the largest step."""
        return int(np.diff(self.ends).max())
