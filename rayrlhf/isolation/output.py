"""Output of user code: a log file of bounded size, with the first lines also passed to a callback."""

from __future__ import annotations

import codecs
import logging
import os
import sys
import threading
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE_BYTES = 8 << 20  # then it is rotated to <file>.1, which replaces the previous one
FIRST_LINES = 5
SHOWN_CHARACTERS = 200  # of a line
READ_BYTES = 1 << 16


class OutputLog:
    """Collects the output of successive processes. `say` receives the first lines, then at 10, 100, … further
    lines their number.
    """

    def __init__(self, name: str, path: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self.name = name
        self.path = path
        self.say = say
        self.last_line = ""
        self._file: _File | None = None
        self._lock = threading.Lock()
        self._num_lines = 0
        self._num_said = 0  # lines after the first ones that were reported
        self._threads: list[threading.Thread] = []

    def read(self, fd: int) -> None:
        """Read `fd` in a thread until its end, then close it."""
        thread = threading.Thread(target=self._follow, args=(fd,), daemon=True, name="output")
        thread.start()
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]

    def _follow(self, fd: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        line = ""
        with os.fdopen(fd, "rb", buffering=0) as pipe:
            while part := pipe.read(READ_BYTES):
                text = decoder.decode(part)
                with self._lock:
                    self._write(text)
                    *lines, line = (line + text).split("\n")
                    line = line[-READ_BYTES:]  # a line without an end
                    for each in lines:
                        self._add(each)
        with self._lock:
            if line:
                self._add(line)

    def _write(self, text: str) -> None:
        if self.path is None:
            return
        if self._file is None:
            self._file = _File(self.path)
        self._file.emit(logging.LogRecord(self.name, logging.INFO, "", 0, text, None, None))

    def _add(self, line: str) -> None:
        self._num_lines += 1
        self.last_line = line[:SHOWN_CHARACTERS] if line.strip() else self.last_line
        if self.say is None:
            return
        further = self._num_lines - FIRST_LINES
        if further <= 0:
            cut = " …" if len(line) > SHOWN_CHARACTERS else ""
            self._say(f"{self.name}: {line[:SHOWN_CHARACTERS]}{cut}")
        elif further >= 10 and further >= 10 * self._num_said:
            self._say_how_many(further)

    def _say_how_many(self, further: int) -> None:
        self._num_said = further
        where = f" in {self.path}" if self.path is not None else ""
        self._say(f"{self.name}: … {further:,} more line{'s' * (further > 1)}{where}")

    def _say(self, text: str) -> None:
        assert self.say is not None
        try:
            self.say(text)
        except Exception as error:
            # The callback failed. The pipe must still be read, or the process would block at its next line.
            self.say = None
            print(f"the first lines of {self.name} are not shown: {error!r:.200}", file=sys.stderr)

    def close(self, wait_seconds: float = 0.0) -> None:
        """Call it when the processes have ended; waits until their pipes are read."""
        for thread in self._threads:
            thread.join(wait_seconds)
        with self._lock:
            further = self._num_lines - FIRST_LINES
            if self.say is not None and further > self._num_said:
                self._say_how_many(further)
            if self._file is not None:
                self._file.close()
                self._file = None


class _File(RotatingFileHandler):
    """Writes pieces of text. If the file cannot be written, logs one line and drops further output."""

    terminator = ""

    def __init__(self, path: Path) -> None:
        self.broken = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(path, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8", delay=True)
        except OSError as error:
            self._give_up(path, error)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.broken:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self._give_up(Path(self.baseFilename), sys.exc_info()[1])

    def close(self) -> None:
        if not self.broken:
            super().close()

    def _give_up(self, path: Path, error: BaseException | None) -> None:
        self.broken = True
        print(f"the output of user code is not saved: cannot write {path}: {error}", file=sys.stderr)
