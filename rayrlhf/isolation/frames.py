"""What goes through the pipes between a process with foreign code and its owner, and what may go wrong.

A frame is 8 bytes of length and the content. Requests are pickled: the owner trusts itself. Answers are JSON:
whatever foreign code has done to its process, reading its answers runs nothing.
"""

from __future__ import annotations

import json
import struct
import traceback
from collections.abc import Mapping
from typing import Any

from rayrlhf.untrusted_text import one_line, visible

HEADER = struct.Struct("<Q")
MAX_ANSWER_BYTES = 64 << 20


class CodeError(ValueError):
    """Foreign code raised, gave something that nobody can use, or took too long; the message says which."""


class CodeTimeout(CodeError):
    """A call that missed its deadline."""


class ProcessDied(CodeError):
    """The process is gone. `alone`: the call was the only one that ran in it, so it is what ended it."""

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def frame(content: bytes) -> bytes:
    return HEADER.pack(len(content)) + content


def encoded(answer: Mapping[str, Any]) -> bytes:
    """The answer's frame. Raises `CodeError` for one that cannot travel."""
    try:
        content = json.dumps(answer, default=_plain).encode(errors="surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise CodeError(f"returned something that is no plain data ({error})") from error
    if len(content) > MAX_ANSWER_BYTES:
        raise CodeError(f"returned {len(content) >> 20} MiB; at most {MAX_ANSWER_BYTES >> 20} are taken")
    return frame(content)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, torch and the like."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"an object of type {type(value).__name__}")


def described(error: BaseException, own_files: tuple[str, ...]) -> str:
    """Type and last line of its message, and the line of the user's file that it came through; `own_files`
    are ours.
    """
    message = (str(error).strip().splitlines() or [""])[-1]
    frames = traceback.extract_tb(error.__traceback__)
    ours = (*own_files, __file__)
    foreign = [each for each in frames if each.filename not in ours and not each.filename.startswith("<")]
    own = [each for each in foreign if each.filename == foreign[0].filename]
    place = f" ({own[-1].filename.rpartition('/')[2]}:{own[-1].lineno})" if own else ""
    # It is logged, kept with the sample and shown: user code may raise whatever a response held.
    return f"{type(error).__name__}: {one_line(message[:500])}{visible(place)}"
