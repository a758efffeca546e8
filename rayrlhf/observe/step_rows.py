"""JSON-lines file with rows in the order of steps, kept consistent when a run resumes from an earlier step.

A run that resumes from the checkpoint of step 10 after it logged step 13 logs steps 11 to 13 again. Each step
is in the file once: new rows replace those of the earlier attempt, which are moved to `superseded.jsonl`. A
line that was cut when the process was killed is repaired or moved there too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SUPERSEDED = "superseded.jsonl"
NO_STEP = -1
_STEP_FIRST = re.compile(rb'\{"step": (\d+)[,}]')  # how our lines begin

IsTaken = Callable[[int, int], bool]  # step, and the number of the line


class StepRows:
    """One such file. `highest`: the highest step in it, `NO_STEP` if there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.highest = NO_STEP
        self._repair_end()
        for _, step in self._lines(quick_step_of):
            if step is not None:
                self.highest = max(self.highest, step)

    def add(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(json_line, rows)))
        self.highest = max(self.highest, step)

    def take_back(self, step: int) -> int:
        """Move the rows of this and later steps out of the file. Returns their number."""
        return self._move(lambda at, _: at >= step) if step <= self.highest else 0

    def take_back_last(self, step: int, containing: bytes) -> int:
        """Move the last row of this step that contains these bytes, and the rows of all later steps."""
        found = [n for n, (line, at) in enumerate(self._lines()) if at == step and containing in line]
        last = found[-1] if found else None
        return self._move(lambda at, number: at > step or number == last)

    def _move(self, is_taken: IsTaken) -> int:
        """Moved rows are on disk in the other file before they are removed from this one: a kill in between
        leaves them in both.
        """
        partial = self.path.with_name(f".{self.path.name}.partial")
        moved: list[str] = []
        self.highest = NO_STEP
        with partial.open("wb") as kept:
            for number, (line, step) in enumerate(self._lines()):
                if step is None or is_taken(step, number):
                    moved.append(self._superseded(line))
                else:
                    kept.write(line)
                    self.highest = max(self.highest, step)
            kept.flush()
            os.fsync(kept.fileno())
        self._append_superseded(moved)
        os.replace(partial, self.path)
        return len(moved)

    def _lines(self, read: Callable[[bytes], int | None] | None = None) -> Iterator[tuple[bytes, int | None]]:
        """Each line with its step; None for a line that is not a row with a step."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                yield line, (read or step_of)(line)

    def _repair_end(self) -> None:
        """Complete or move a last line that was cut when the process was killed."""
        if not self.path.is_file() or not (size := self.path.stat().st_size):
            return
        with self.path.open("r+b") as file:
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return
            begin = _start_of_last_line(file, size)
            file.seek(begin)
            line = file.read()
            if step_of(line) is not None:  # only its end is missing
                file.write(b"\n")
                return
            self._append_superseded([self._superseded(line)])
            file.truncate(begin)

    def _superseded(self, line: bytes) -> str:
        """A row with the name of its file; if the line is not a row, its text."""
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            row = {"line": line.decode("utf-8", "replace").rstrip("\n")}
        return json_line({"file": self.path.name, **row})

    def _append_superseded(self, lines: Sequence[str]) -> None:
        if not lines:
            return
        with self.path.with_name(SUPERSEDED).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())


def step_of(line: bytes) -> int | None:
    """The step of a row; None for a cut line, and for one that is not a row with a step."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def quick_step_of(line: bytes) -> int | None:
    """The same without parsing the whole line: rollouts may be gigabytes."""
    found = _STEP_FIRST.match(line)
    return int(found[1]) if found and line.endswith(b"}\n") else step_of(line)


def json_line(row: dict[str, Any]) -> str:
    """Lossless: generated text can be read back, lone surrogates included."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row, default=str)
    return line + "\n"


def _start_of_last_line(file: Any, size: int) -> int:
    block, end = 1 << 16, size
    while end > 0:
        begin = max(0, end - block)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0
