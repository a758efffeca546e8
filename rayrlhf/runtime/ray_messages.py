"""Redirects Ray's messages to the driver into a log file instead of the terminal.

Ray prints the messages of its node processes to the driver's standard output, a coloured paragraph for each
worker that dies. The console reports the same in one line; the log keeps the paragraph. Ray 2.60 has no
setting for it: its listener looks up `print_to_stdstream` by name at each message
(tests/runtime/test_ray_messages.py fails when that changes).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ray._private import worker

RAY_LOG = "ray.log"  # in the run's folder


@contextmanager
def ray_messages_in(log: Path) -> Iterator[None]:
    """Redirect while the body runs. If the log cannot be written, messages are lost and the run continues."""
    original = worker.print_to_stdstream

    def keep(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        now = datetime.now().isoformat(timespec="seconds")
        try:
            with log.open("a", encoding="utf-8") as file:
                file.writelines(f"{now} {data.get('pid', 'ray')}: {line}\n" for line in data.get("lines", []))
        except OSError:
            return

    worker.print_to_stdstream = keep
    try:
        yield
    finally:
        worker.print_to_stdstream = original
