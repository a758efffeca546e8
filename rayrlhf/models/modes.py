"""Who may read what a run leaves: whom the umask lets, as for every other file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from stat import S_IMODE

logger = logging.getLogger(__name__)
READABLE, EXECUTABLE = 0o444, 0o111


def honour_umask(folder: Path) -> None:
    """Give every file and folder below `folder`, and itself, the modes of ones that are made there now.

    safetensors makes its files with 0600 and `tempfile.mkdtemp` its folders with 0700, whatever the umask.
    The modes are those of a file and a folder that are made for it: where a folder has an access list, or a
    mount modes of its own, these count and not the umask. Where modes cannot be changed, it warns.
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
            except OSError as error:  # a mount that has no modes, or whose owner is somebody else
                logger.warning("%s keeps mode %o (%s): others may be unable to read it", path, mode, error)
                return
