"""What a checkpoint consists of: a file in it with sizes and checksums, by which a whole one is known.

A folder is put together under another name and renamed when all of it is there, so a process that is killed
leaves no half of one. What happens to it afterwards (a full disk's empty files, a copy that was cut off, a
bad block) the manifest shows.
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

import xxhash

from rayrlhf.train import collectives

MANIFEST = "manifest.json"
VERSION = 1
SMALL_BYTES = 2**20  # up to here, checking a file's contents costs no more than opening it
PIECE_BYTES = 2**22
READERS = min(8, os.cpu_count() or 1)
PROGRESS_SECONDS = 10.0

Tell = Callable[[str], None]


class DamagedCheckpoint(RuntimeError):
    """A checkpoint is not what was saved."""


class File(TypedDict):
    bytes: int
    xxh3: str  # of the contents, 128 bits: against damage, not against an attacker


def files_of(folder: Path) -> dict[str, File]:
    """Every file below `folder`, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): File(bytes=path.stat().st_size, xxh3=checksum(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checksum(path: Path, read: Callable[[int], None] = lambda num_bytes: None) -> str:
    """`read` hears of every piece's bytes."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            read(count)
    return digest.hexdigest()


def commit(own: Path, folder: Path, about: Mapping[str, Any]) -> None:
    """The files of every rank's `own` folder become `folder`, whole or not at all, with a manifest that also
    says what it is `about`. Collective; the ranks' folders have one parent, on the file system of `folder`.
    """
    rank = collectives.rank()
    files = files_of(own)
    partial = own.parent / f"{folder.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    collectives.max_over_ranks(0.0)  # it is there
    for name in files:
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(own / name, target)
    everything = {name: file for part in collectives.gather_lists([files]) for name, file in part.items()}
    if rank == 0:
        _write(partial, everything, about)
        if folder.exists():  # damaged, or of workers that died before Ray Train knew of it
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(partial, folder)
    collectives.max_over_ranks(0.0)  # it has its name
    shutil.rmtree(own, ignore_errors=True)


def _write(folder: Path, files: Mapping[str, File], about: Mapping[str, Any]) -> None:
    with (folder / MANIFEST).open("w") as file:
        json.dump({"version": VERSION, **about, "files": dict(sorted(files.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest; None in a checkpoint of a version that wrote none. Raises `ValueError` saying what is
    wrong with it.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(map(_is_file, files.values())):
        raise ValueError(f"{MANIFEST} has no list of files")
    return found


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3"), str)
    )


def damage(folder: Path, files: Mapping[str, File], *, full: bool, tell: Tell | None = None) -> str | None:
    """Why this is not what the manifest says; None when it is. Sizes and small files are always looked at,
    with `full` the contents of the big ones too: `tell` hears how far that is, when it takes long.
    """
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != file["bytes"]:
            return f"{name} has {size:,} bytes of {file['bytes']:,}"
    small = [name for name, file in files.items() if file["bytes"] <= SMALL_BYTES]
    big = [name for name in files if full and name not in set(small)]
    return _first_changed(folder, files, small) or _first_changed(folder, files, big, tell)


def _first_changed(
    folder: Path, files: Mapping[str, File], names: list[str], tell: Tell | None = None
) -> str | None:
    progress = _Progress(folder.name, sum(files[name]["bytes"] for name in names), tell)

    def look(name: str) -> str | None:
        try:
            same = checksum(folder / name, progress.add) == files[name]["xxh3"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if same else f"{name} has other contents than were saved"

    with ThreadPoolExecutor(READERS) as pool:  # hashing lets go of the interpreter, as reading does
        for problem in pool.map(look, names):
            if problem:
                pool.shutdown(cancel_futures=True)
                return problem
    return None


class _Progress:
    def __init__(self, name: str, total: int, tell: Tell | None) -> None:
        self.name, self.total, self.tell = name, total, tell
        self.done = 0
        self.last = time.monotonic()
        self.lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.done += num_bytes
            if self.tell is not None and time.monotonic() - self.last > PROGRESS_SECONDS:
                self.last = time.monotonic()
                self.tell(f"checking {self.name}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB")


def damage_without_manifest(folder: Path) -> str | None:
    """What can be seen of a checkpoint that has no manifest: JSON that is none, tensors' files that are cut.

    An archive's table of contents is at its end.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            try:
                json.loads(path.read_text())
            except (ValueError, OSError) as error:
                return f"{name} cannot be read ({error})"
        elif path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{name} is cut off, or no tensors' file"
    return None
