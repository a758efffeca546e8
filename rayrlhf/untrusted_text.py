"""Escapes untrusted text (responses, reward errors, data rows, tracebacks, file names) for a terminal or a
log: control and invisible characters are written as escapes, `\\x1b` or `\\u202e`.

Files for programs (rollouts.jsonl, metrics.jsonl) contain the original text, with JSON's own escapes.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import TextIO

from rayrlhf.secrets import masked

LOG_CHARACTERS = 1_000_000  # limit for a traceback in a log
MESSAGE_CHARACTERS = 20_000  # limit for an error message; it may list many problems
LINE_CHARACTERS = 2_000  # limit for a single line

# Unicode's control, format and surrogate characters, its line and paragraph separators, and characters
# rendered with no width (Default_Ignorable_Code_Point). Excluded: signs of Arabic and Kaithi that are of
# category Cf but visible, and U+FE0E and U+FE0F, which select text or emoji style for the character before.
_HIDDEN = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "]"
)
COLOUR = re.compile(r"\x1b\[[\d;:]*m")


def visible(text: str, *, limit: int | None = None) -> str:
    """The text with control and invisible characters escaped as `\\x1b`, `\\u202e` or `\\U000e0041`; newlines
    and tabs stay. Cut to `limit` characters, plus a note of how many are missing.

    Characters are escaped one by one, so a stream may be split at any position.
    """
    left_out = 0
    if limit is not None and len(text) > limit:
        text, left_out = text[:limit], len(text) - limit
    shown = _HIDDEN.sub(_escape, text)
    return f"{shown} … and {left_out} more characters" if left_out else shown


def one_line(text: str, *, limit: int = LINE_CHARACTERS) -> str:
    """`visible`, with each run of white space replaced by one space."""
    return visible(
        " ".join(text[: 4 * limit].split()) if len(text) > 4 * limit else " ".join(text.split()), limit=limit
    )


def printable(text: str, encoding: str | None) -> str:
    """The text with characters that the encoding lacks as escapes, `\\u2026`."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_line(text: str, file: TextIO | None = None, *, end: str = "\n") -> None:
    """`print` for untrusted text; secrets are masked. `file`: stdout by default."""
    file = file or sys.stdout
    shown = visible(masked(text), limit=MESSAGE_CHARACTERS)
    print(printable(shown, getattr(file, "encoding", None)), end=end, file=file, flush=True)


def last_line(text: str) -> str:
    """The last line of a traceback: its message."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def traceback_text(error: BaseException) -> str:
    """The traceback of an error, for a log: it may quote text from a worker, a reward or a data row."""
    return visible(masked("".join(traceback.format_exception(error))), limit=LOG_CHARACTERS)


def guard_terminal() -> None:
    """Also escape what Python itself writes to stderr (tracebacks of uncaught errors, warnings of loggers
    without handlers). Call it at program start; repeated calls have no effect.
    """
    sys.excepthook = _write_uncaught
    threading.excepthook = _write_uncaught_in_thread
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleFormatter())


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(masked(super().format(record)), limit=MESSAGE_CHARACTERS)


def _write_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(traceback_text(error), end="", file=sys.stderr, flush=True)


def _write_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is None or issubclass(arguments.exc_type, SystemExit):
        return
    name = arguments.thread.name if arguments.thread is not None else "unknown"
    text = f"Exception in thread {name}:\n{traceback_text(arguments.exc_value)}"
    print(text, end="", file=sys.stderr, flush=True)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character in "\n\t":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
