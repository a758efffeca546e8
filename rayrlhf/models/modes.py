"""File modes of a run's output: as given by the umask."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from stat import S_IMODE

logger = logging.getLogger(__name__)
READABLE, EXECUTABLE = 0o444, 0o111


def honour_umask(folder: Path) -> None:
    """Set the modes of `folder` and everything below it to those of newly created files and folders.

    safetensors creates its files with 0600 and `tempfile.mkdtemp` its folders with 0700, whatever the umask.
    The modes are taken from a file and a folder created for this purpose: if a folder has an access list, or
    a mount has fixed modes, these apply instead of the umask. If modes cannot be changed, it warns.
    """
    probe = folder / f".mode-{os.getpid()}"
    probe.mkdir()
    try:
        probed_file = probe / "file"
        probed_file.touch(exist_ok=False)
        file_mode, folder_mode = S_IMODE(probed_file.stat().st_mode), S_IMODE(probe.stat().st_mode)
        probed_file.unlink()
    finally:
        probe.rmdir()
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink():
            continue
        mode = S_IMODE(path.stat().st_mode)
        wanted = folder_mode if path.is_dir() else file_mode
        if path.is_file() and mode & EXECUTABLE:
            wanted |= (file_mode & READABLE) >> 2  # for those who may read it
        if mode != wanted:
            try:
                path.chmod(wanted)
            except OSError as error:  # a mount without modes, or with another owner
                logger.warning("%s keeps mode %o (%s): others may be unable to read it", path, mode, error)
                return
