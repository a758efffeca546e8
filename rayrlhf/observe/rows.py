"""Progress over rows: a live bar in a terminal, occasional lines in a log."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from rayrlhf.observe.console import PHASE_CHARACTERS, Console
from rayrlhf.secrets import masked
from rayrlhf.untrusted_text import one_line


class RowsProgress:
    """Context manager; `advance` adds finished rows, `update` shows them with a text."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.bar: Progress | None = None
        if console.mode == "live":
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("rows"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=console.rich,
            )
            self.task = self.bar.add_task("", total=total, completed=done)

    @property
    def num_left(self) -> int:
        return self.total - self.done

    def advance(self, rows: int) -> None:
        self.done += rows

    def update(self, text: str) -> None:
        if self.bar is not None:
            description = one_line(masked(text), limit=PHASE_CHARACTERS)
            self.bar.update(self.task, completed=self.done, description=description)
        else:
            self.console.say(f"rows {self.done}/{self.total}  {text}")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
