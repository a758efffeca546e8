"""Store of the prepared examples of a supervised run: one Arrow file, memory-mapped by its readers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa

from rayrlhf.data.store import RowStore
from rayrlhf.samples import Example, TokenSequence

# A row holds one or two sequences; the inner lists have one entry per token.
SEQUENCE_FIELDS = [
    pa.field("input_ids", pa.list_(pa.list_(pa.int32()))),
    pa.field("loss_mask", pa.list_(pa.list_(pa.uint8()))),
    pa.field("targets", pa.list_(pa.list_(pa.float32()))),  # inner lists are empty if no token is labelled
    pa.field("value", pa.float64()),
]
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64()),
        pa.field("num_tokens", pa.int64()),  # of all sequences of the row
        *SEQUENCE_FIELDS,
    ]
)


class ExampleStore(RowStore):
    """Prepared examples, with the columns of `EXAMPLE_SCHEMA`."""

    KIND = "an example"

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Tokens of every example, [rows] int64. Reads only this column."""
        return self._rows.numbers("num_tokens")

    def __getitem__(self, row_id: int) -> Example:
        return examples_of(self.take([row_id]))[0]

    def __iter__(self) -> Iterator[Example]:
        for row_id in range(len(self)):
            yield self[row_id]


def examples_of(table: pa.Table) -> list[Example]:
    """The rows of a table with the columns of `EXAMPLE_SCHEMA`."""
    names = ("row_id", "input_ids", "loss_mask", "targets", "value")
    columns = [table.column(name).to_pylist() for name in names]
    return [
        Example(row_id, tuple(map(TokenSequence, input_ids, loss_mask, targets)), value)
        for row_id, input_ids, loss_mask, targets, value in zip(*columns, strict=True)
    ]
