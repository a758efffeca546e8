"""Runs a command whose output goes to a log, and says meanwhile what it is at."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from requirements.indexes import redact

QUIET_SECONDS = 8.0  # between two lines where there is no terminal
STALL_SECONDS = 900.0  # without a byte written or a word said: given up
END_SECONDS = 10.0


class Progress:
    """The lines of one installation, each with the time since its start."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._started = time.monotonic()
        self._written = 0  # bytes, by commands that are done
        self._terminal = sys.stdout.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        self._clear()
        print(text, flush=True)

    def run(self, command: Sequence[str], env: Mapping[str, str], *, stdin: str | None = None) -> int:
        """Its exit status; 124 where it stalled. Raises `FileNotFoundError` for no such command."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {redact(' '.join(command))}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                env=dict(env),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            )
        if stdin is not None and process.stdin is not None:
            with process.stdin as pipe, contextlib.suppress(BrokenPipeError):  # its exit status says why
                pipe.write(stdin.encode())
        try:
            return self._watch(process)
        finally:
            self._clear()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def tail(self, lines: int = 15) -> str:
        """The log's last lines, without credentials."""
        return redact("\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]))

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        shown = moved = time.monotonic()
        state: tuple[int, int] = (0, 0)
        while True:
            try:
                status = process.wait(0.25)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                written = _bytes_written(process.pid)
                if (written, self.log.stat().st_size) != state:
                    state, moved = (written, self.log.stat().st_size), now
                if now - moved > STALL_SECONDS:
                    return 124
                if now - shown > (0.5 if self._terminal else QUIET_SECONDS):
                    shown = now
                    self._show(self._written + written)
            else:
                self._written += state[0]
                return status

    def _show(self, written: int) -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        text = f"  {minutes}:{seconds:02d}  {written / 1e9:.1f} GB written"
        last = self.tail(1).strip()
        if not last.startswith("$ "):  # the command itself, which has said nothing yet
            text += f", {last}"
        width = shutil.get_terminal_size().columns - 1
        if self._terminal:
            print(f"\r\033[K{text[:width]}", end="", flush=True)
        else:
            print(text[:160], flush=True)

    def _clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", flush=True)


def _bytes_written(pid: int) -> int:
    try:
        entries = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except (OSError, ValueError):  # it has ended, or this kernel does not count
        return 0
    return int(entries["wchar"])
