"""What foreign code prints: a file of bounded size, and the first lines to somebody who reads."""

from __future__ import annotations

import codecs
import logging
import os
import sys
import threading
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE_BYTES = 8 << 20  # then it becomes <file>.1, and the one before goes
FIRST_LINES = 5
SHOWN_CHARACTERS = 200  # of a line
READ_BYTES = 1 << 16


class OutputLog:
    """Takes the output of one process after the other. `say` gets the first lines, then at 10, 100, … further
    ones how many there are in the file.
    """

    def __init__(self, name: str, path: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self.name = name
        self.path = path
        self.say = say
        self.last_line = ""
        self._file: _File | None = None
        self._lock = threading.Lock()
        self._num_lines = 0
        self._num_said = 0  # of those behind the first
        self._threads: list[threading.Thread] = []

    def read(self, fd: int) -> None:
        """Follow what arrives at `fd`, and close it at the end."""
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
                    line = line[-READ_BYTES:]  # one that never ends
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
            # Who reads has gone. The pipe must be read all the same, or the process would stop at its
            # next line.
            self.say = None
            print(f"the first lines of {self.name} are not shown: {error!r:.200}", file=sys.stderr)

    def close(self, wait_seconds: float = 0.0) -> None:
        """Call it when the processes have ended; it waits for what they have left in their pipes."""
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
    """Writes pieces of text. A file that cannot be written is given up with one line in our own log."""

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
        print(f"what the user's code prints is not kept: cannot write {path}: {error}", file=sys.stderr)
