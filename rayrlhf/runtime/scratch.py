"""Where checkpoints are put together before they get their name: a folder of each start of a run.

A worker that is killed while it saves leaves a whole checkpoint there. The driver holds a lock while it
lives, which the kernel lets go whatever kills it: what nobody holds is nobody's.
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


@contextmanager
def own_scratch(run_path: Path, run_id: str) -> Iterator[None]:
    """The folder of this start, and nothing that earlier ones have left. Raises `InputError`."""
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
        with contextlib.suppress(OSError):  # a file system without locks: others then leave it alone
            fcntl.flock(held, fcntl.LOCK_EX)  # at most as long as somebody looks whether it is held
        try:
            yield
        finally:
            shutil.rmtree(scratch_of(run_path, run_id), ignore_errors=True)
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another run of this folder is there
                root.rmdir()


def clear_abandoned(root: Path) -> None:
    """Remove what belongs to no living run; what links lead to stays."""
    for entry in sorted(root.iterdir()):
        name = entry.name.removesuffix(LOCK)
        if _is_held(root / (name + LOCK)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Where locks do not work, every start counts as alive."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
