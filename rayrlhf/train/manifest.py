"""Checkpoint manifest: a file with the sizes and checksums of all files, to detect damaged checkpoints.

A checkpoint is assembled under another name and renamed once it is complete, so a process that is killed
leaves no partial one. The manifest detects later damage: empty files of a full disk, an interrupted copy, a
bad block.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from rayrlhf.storage.folder import Folder, LocalFolder, RemoteFolder
from rayrlhf.train import collectives

MANIFEST = "manifest.json"
VERSION = 1
SMALL_BYTES = 2**20  # up to here, checking a file's contents costs no more than opening it
READERS = min(8, os.cpu_count() or 1)
PROGRESS_SECONDS = 10.0

Say = Callable[[str], None]  # prints a console line


class DamagedCheckpoint(RuntimeError):
    """A checkpoint differs from what was saved."""


class File(TypedDict):
    bytes: int
    xxh3: str  # of the contents, 128 bits: detects damage, not an attacker


def files_of(folder: Path) -> dict[str, File]:
    """Every file below `folder`, by its relative path."""
    local = LocalFolder(folder)
    return {name: File(bytes=size, xxh3=local.checksum(name)) for name, size in local.sizes().items()}


def commit(own: Path, folder: Folder, about: Mapping[str, Any]) -> None:
    """Bring the files of every rank's `own` folder into `folder`, with a manifest. Collective.

    The folders `own` of all ranks have one parent, on the file system of a local `folder`.
    """
    Commit(own, folder, about, staging=own.parent).finish()


class Commit:
    """Brings the files of every rank's `own` folder into `folder`, with a manifest: all, or none that readers
    regard as a checkpoint. They are hashed and copied in a thread, between two collective calls, the
    construction and `finish`.

    Args:
        about: further fields of the manifest.
        staging: where a local `folder` is assembled, on its file system and the same for all ranks. Files
            that are on it are moved, others copied.
    """

    def __init__(self, own: Path, folder: Folder, about: Mapping[str, Any], *, staging: Path) -> None:
        self.own, self.folder, self.about = own, folder, about
        self.partial = staging / f"{folder.name}.partial"
        if collectives.rank() == 0:
            if isinstance(folder, RemoteFolder):
                folder.parent.remove(folder.name)  # damaged, or of workers that died before it was complete
            else:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
        collectives.max_over_ranks(0.0)  # barrier: from here on, nothing is removed
        self._thread = ThreadPoolExecutor(1)
        self._files = self._thread.submit(self._transfer)

    def _transfer(self) -> dict[str, File]:
        files = files_of(self.own)
        if isinstance(self.folder, RemoteFolder):
            self.folder.upload(self.own, files)
            return files
        for name in files:
            target = self.partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.own / name, target)
        return files

    @property
    def is_ready(self) -> bool:
        """Whether `finish` would not wait for this rank's files."""
        return self._files.done()

    def finish(self) -> None:
        """Wait for the files of all ranks, and make them a checkpoint. Collective. Raises `OSError`."""
        everything = _of_all_ranks(self._files.result())
        self._thread.shutdown()
        if collectives.rank() == 0:
            text = json.dumps({"version": VERSION, **self.about, "files": everything}, indent=1)
            if isinstance(self.folder, RemoteFolder):
                self.folder.write(MANIFEST, text)  # the last file: a folder without one is no checkpoint
            else:
                _write(self.partial / MANIFEST, text)
                folder = Path(str(self.folder))
                if folder.exists():  # damaged, or of workers that died before reporting it to Ray Train
                    shutil.rmtree(folder)
                folder.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.partial, folder)
        collectives.max_over_ranks(0.0)  # barrier: all can read it
        shutil.rmtree(self.own, ignore_errors=True)


def _of_all_ranks(files: Mapping[str, File]) -> dict[str, File]:
    gathered = {name: file for part in collectives.gather_lists([files]) for name, file in part.items()}
    return dict(sorted(gathered.items()))


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Folder) -> dict[str, Any] | None:
    """The manifest; None in a checkpoint of a version that wrote none, and in an object store if the
    checkpoint is not complete. Raises `ValueError` if invalid.
    """
    try:
        text = folder.read(MANIFEST)
        found = None if text is None else json.loads(text)
    except (ValueError, OSError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if text is None:
        return None
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(map(_is_file, files.values())):
        raise ValueError(f"{MANIFEST} has no list of files")
    return found


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3"), str)
    )


def damage(folder: Folder, files: Mapping[str, File], *, full: bool, say: Say | None = None) -> str | None:
    """Compare a checkpoint with its manifest: sizes of all files, and contents of the small ones.

    Args:
        full: also compare the contents of the large files, unless they would have to be downloaded.
        say: receives a progress line when that takes long.

    Returns:
        What is wrong; None if the checkpoint is intact.
    """
    sizes = folder.sizes()
    for name, file in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != file["bytes"]:
            return f"{name} has {sizes[name]:,} bytes of {file['bytes']:,}"
    small = [name for name, file in files.items() if file["bytes"] <= SMALL_BYTES]
    big = [name for name in files if full and not folder.is_remote and name not in set(small)]
    return _first_changed(folder, files, small) or _first_changed(folder, files, big, say)


def _first_changed(
    folder: Folder, files: Mapping[str, File], names: list[str], say: Say | None = None
) -> str | None:
    progress = _Progress(folder.name, sum(files[name]["bytes"] for name in names), say)

    def look(name: str) -> str | None:
        try:
            same = folder.checksum(name, progress.add) == files[name]["xxh3"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        return None if same else f"{name} has other contents than were saved"

    with ThreadPoolExecutor(READERS) as pool:  # hashing and reading both release the GIL
        for problem in pool.map(look, names):
            if problem:
                pool.shutdown(cancel_futures=True)
                return problem
    return None


class _Progress:
    def __init__(self, name: str, total: int, say: Say | None) -> None:
        self.name, self.total, self.say = name, total, say
        self.done = 0
        self.last = time.monotonic()
        self.lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.done += num_bytes
            if self.say is not None and time.monotonic() - self.last > PROGRESS_SECONDS:
                self.last = time.monotonic()
                self.say(f"checking {self.name}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB")


def damage_without_manifest(folder: Path) -> str | None:
    """Detectable damage of a checkpoint without a manifest: invalid JSON, truncated tensor files.

    A tensor file is a zip archive, whose table of contents is at its end.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            try:
                json.loads(path.read_text())
            except (ValueError, OSError) as error:
                return f"{name} cannot be read ({error})"
        elif path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{name} is truncated, or not a tensor file"
    return None
