"""Scratch folders in which checkpoints are assembled before they are renamed: one per start of a run.

A worker that is killed while saving can leave a whole checkpoint there. The driver holds a lock on its
folder, which the kernel releases however the driver ends: an unlocked folder is abandoned and is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrlhf.runtime.preflight import InputError

FOLDER = "scratch"
LOCK = ".lock"


def scratch_of(run_path: Path, run_id: str) -> Path:
    return run_path / FOLDER / run_id


def own_scratch(local_path: Path, run_id: str) -> Path:
    """Scratch folder on this node's own disk; those of earlier starts of the run, which left them, are
    removed.
    """
    folder = scratch_of(local_path, run_id)
    for entry in folder.parent.glob("rayrlhf-*"):
        if not entry.name.startswith(run_id):
            shutil.rmtree(entry, ignore_errors=True)
    return folder


@contextmanager
def locked_scratch(run_path: Path, run_id: str) -> Iterator[None]:
    """Lock the scratch folder of this start, after removing abandoned ones; removes it on exit.

    Raises:
        InputError: if `<run>/scratch` is a symbolic link.
    """
    root = run_path / FOLDER
    if root.is_symlink():
        raise InputError(
            f"{root} is a link; wanted a folder on the run's file system, from which checkpoints are moved. "
            "Fix: remove the link"
        )
    root.mkdir(exist_ok=True)
    clear_abandoned(root)
    lock = root / (run_id + LOCK)
    with lock.open("w") as held:
        with contextlib.suppress(OSError):  # a file system without locks: other starts then keep this folder
            fcntl.flock(held, fcntl.LOCK_EX)  # waits at most while another start tests the lock
        try:
            yield
        finally:
            shutil.rmtree(scratch_of(run_path, run_id), ignore_errors=True)
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another start uses it
                root.rmdir()


def clear_abandoned(root: Path) -> None:
    """Remove the folders of runs that have ended; targets of symbolic links are kept."""
    for entry in sorted(root.iterdir()):
        name = entry.name.removesuffix(LOCK)
        if _is_held(root / (name + LOCK)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Whether a process holds `lock`; always True on a file system without locks."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
