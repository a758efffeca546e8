"""Text that is not ours (responses, rewards' errors, rows of data, tracebacks, file names) on its way to a
terminal or a log: what would steer the terminal or hide is written as an escape, `\\x1b` or `\\u202e`.

Files that programs read (rollouts.jsonl, metrics.jsonl) hold the text itself, with JSON's own escapes.
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

LOG_CHARACTERS = 1_000_000  # of a traceback in a log
MESSAGE_CHARACTERS = 20_000  # of an error; it may list many problems
LINE_CHARACTERS = 2_000  # of what is meant to be one line

# Unicode's control, format and surrogate characters, its line and paragraph separators, and what is drawn
# with no width (Default_Ignorable_Code_Point). Left out: signs of Arabic and Kaithi that are of category Cf
# but drawn, and U+FE0E and U+FE0F, which choose between text and picture for the character before them.
_HIDDEN = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "]"
)
COLOUR = re.compile(r"\x1b\[[\d;:]*m")


def visible(text: str, *, limit: int | None = None) -> str:
    """The text with every character that steers a terminal or is not seen as `\\x1b`, `\\u202e` or
    `\\U000e0041`; newlines and tabs stay. Never longer than `limit` characters and a note of what is missing.

    Characters are looked at one by one, so the pieces of a stream may be cut anywhere.
    """
    left_out = 0
    if limit is not None and len(text) > limit:
        text, left_out = text[:limit], len(text) - limit
    shown = _HIDDEN.sub(_escape, text)
    return f"{shown} … and {left_out} more characters" if left_out else shown


def one_line(text: str, *, limit: int = LINE_CHARACTERS) -> str:
    """The same with each stretch of white space as one space."""
    return visible(
        " ".join(text[: 4 * limit].split()) if len(text) > 4 * limit else " ".join(text.split()), limit=limit
    )


def printable(text: str, encoding: str | None) -> str:
    """The text with what the encoding does not have as escapes, `\\u2026`."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_line(text: str, file: TextIO | None = None, *, end: str = "\n") -> None:
    """`print` for text that may not be ours; secrets are masked. `file`: stdout when left out."""
    file = file or sys.stdout
    shown = visible(masked(text), limit=MESSAGE_CHARACTERS)
    print(printable(shown, getattr(file, "encoding", None)), end=end, file=file, flush=True)


def traceback_text(error: BaseException) -> str:
    """The traceback of an error, for a log: it may quote what a worker, a reward or a row said."""
    return visible(masked("".join(traceback.format_exception(error))), limit=LOG_CHARACTERS)


def guard_terminal() -> None:
    """What reaches stderr by Python itself (the traceback of an error that nobody caught, a warning of a
    logger without handlers) takes the same way. For the beginning of a program; repeating it changes nothing.
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
    told = f"Exception in thread {name}:\n{traceback_text(arguments.exc_value)}"
    print(told, end="", file=sys.stderr, flush=True)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character in "\n\t":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
