"""Whom a test's files can be read by."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def unlike(folder: Path, file_mode: int, folder_mode: int) -> list[str]:
    """What below `folder`, itself included, has another mode; empty is good."""
    return [
        f"{path} {S_IMODE(path.stat().st_mode):o}"
        for path in [folder, *folder.rglob("*")]
        if S_IMODE(path.stat().st_mode) != (folder_mode if path.is_dir() else file_mode)
    ]


def unreadable(folder: Path) -> list[str]:
    """What below `folder` others cannot read; empty is good, and what a umask of 022 wants."""
    others = 0o004
    return [
        f"{path} {path.stat().st_mode:o}"
        for path in [folder, *folder.rglob("*")]
        if not path.stat().st_mode & others
    ]
