"""Frames and errors of the pipe protocol between a subprocess with user code and its owner.

A frame is 8 bytes of length and the content. Requests are pickled: the owner trusts itself. Answers are JSON:
whatever user code has done to its process, parsing its answers executes nothing.
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
    """User code raised, returned an unusable value, or took too long; the message says which."""


class CodeTimeout(CodeError):
    """A call that missed its deadline."""


class ProcessDied(CodeError):
    """The process has ended. `alone`: it was running this call only, so this call is the cause."""

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def frame(content: bytes) -> bytes:
    return HEADER.pack(len(content)) + content


def encoded(answer: Mapping[str, Any]) -> bytes:
    """The answer's frame. Raises `CodeError` for one that cannot be sent."""
    try:
        content = json.dumps(answer, default=_plain).encode(errors="surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise CodeError(f"returned a value that is not plain data ({error})") from error
    if len(content) > MAX_ANSWER_BYTES:
        raise CodeError(f"returned {len(content) >> 20} MiB; the limit is {MAX_ANSWER_BYTES >> 20} MiB")
    return frame(content)


def _plain(value: Any) -> Any:
    """Plain numbers and lists from those of numpy, torch and the like."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"an object of type {type(value).__name__}")


def described(error: BaseException, own_files: tuple[str, ...]) -> str:
    """Error type, last line of its message, and the line of the user's file that raised it. `own_files` are
    files of rayrlhf, to be skipped.
    """
    message = (str(error).strip().splitlines() or [""])[-1]
    frames = traceback.extract_tb(error.__traceback__)
    ours = (*own_files, __file__)
    foreign = [each for each in frames if each.filename not in ours and not each.filename.startswith("<")]
    own = [each for each in foreign if each.filename == foreign[0].filename]
    place = f" ({own[-1].filename.rpartition('/')[2]}:{own[-1].lineno})" if own else ""
    # It is logged, stored with the sample and displayed: the message may contain text of a response.
    return f"{type(error).__name__}: {one_line(message[:500])}{visible(place)}"
