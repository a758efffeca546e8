"""Runs a Ray Data stage over the rows of the sources, and writes a temporary file with random access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from ray.data import Dataset

from rayrlhf.data.row_filter import Tally
from rayrlhf.data.sources.source import READ_TASK_CPUS, ordered_and_quiet
from rayrlhf.data.store import ArrowRows
from rayrlhf.placement.preload import data_task_options

RENDER_BATCH_ROWS = 256


@contextmanager
def spooled(
    read: Callable[[], Dataset],
    stage: Callable[[pa.Table], pa.Table],
    schema: pa.Schema,
    tally: Tally,
    out_path: Path,
    batch_rows: int = RENDER_BATCH_ROWS,
) -> Iterator[ArrowRows]:
    """The rows of `read()` that `stage` outputs (with `schema`) and `tally` keeps, in reading order.

    They are in a temporary file next to `out_path`, which is removed at the end; the folder is created if
    missing.
    """
    out_path.parent.mkdir(parents=True, exist_ok=True)
    spool_path = out_path.with_name(out_path.name + ".rendered")
    try:
        with ordered_and_quiet(), pa.OSFile(str(spool_path), "wb") as sink:
            rendered = read().map_batches(
                stage,
                batch_size=batch_rows,
                batch_format="pyarrow",
                num_cpus=READ_TASK_CPUS,
                **data_task_options(),
            )
            with pa.ipc.new_file(sink, schema) as writer:
                for batch in rendered.iter_batches(batch_size=None, batch_format="pyarrow"):
                    writer.write_table(tally.usable_rows(batch))
        tally.log()
        yield ArrowRows(spool_path)
    finally:
        spool_path.unlink(missing_ok=True)
