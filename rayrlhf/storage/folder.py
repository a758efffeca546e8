"""A folder of a run, on a file system or in an object store, with the operations that checkpoints need."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import xxhash
from filelock import FileLock

from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.file_systems import file_system
from rayrlhf.storage.urls import joined, parent

PIECE_BYTES = 2**22
COPY_THREADS = 8
DATA_FOLDER = "data"  # of the prepared rows, in the run's folder
LAST_OF_EXPORT = "config.json"  # without which a folder is no model


class Folder(Protocol):
    """Names are relative to the folder, with "/" between their parts."""

    @property
    def is_remote(self) -> bool:
        """Whether reading a file's contents means downloading it."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> Folder: ...

    def child(self, name: str) -> Folder: ...

    def exists(self) -> bool: ...

    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted; none if it does not exist."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below it."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's contents; None if there is no such file. Raises `OSError`."""
        ...

    def write(self, name: str, text: str) -> None:
        """Write a file so that readers see it complete or not at all."""
        ...

    def checksum(self, name: str, on_read: Callable[[int], None] = lambda num_bytes: None) -> str:
        """XXH3 hash, 128 bits, of a file; `on_read` gets the number of bytes of each piece read."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing happens if there is none."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """On a file system that all nodes of the run mount."""

    path: Path

    is_remote = False

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    @property
    def parent(self) -> LocalFolder:
        return LocalFolder(self.path.parent)

    def exists(self) -> bool:
        return self.path.is_dir()

    def folders(self) -> list[str]:
        return sorted(each.name for each in self.path.iterdir() if each.is_dir()) if self.exists() else []

    def sizes(self) -> dict[str, int]:
        return {
            file.relative_to(self.path).as_posix(): file.stat().st_size
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        }

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, text)

    def checksum(self, name: str, on_read: Callable[[int], None] = lambda num_bytes: None) -> str:
        digest = xxhash.xxh3_128()
        buffer = memoryview(bytearray(PIECE_BYTES))
        with (self.path / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                on_read(count)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        target = self.path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)


@dataclass(frozen=True)
class RemoteFolder:
    """Behind a URL. A pickled one opens its file system again, with the reader's own credentials."""

    url: str

    is_remote = True

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url,)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        files, path = file_system(self.url)
        return files, path.rstrip("/")

    @property
    def files(self) -> Any:
        """Its `pyarrow.fs.FileSystem`."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """Its path in `files`."""
        return self._opened[1]

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(joined(self.url, name))

    @property
    def parent(self) -> RemoteFolder:
        return RemoteFolder(parent(self.url))

    def exists(self) -> bool:
        from pyarrow.fs import FileType

        return self.files.get_file_info(self.path).type == FileType.Directory

    def folders(self) -> list[str]:
        from pyarrow.fs import FileType

        return sorted(each.base_name for each in self._list() if each.type == FileType.Directory)

    def sizes(self) -> dict[str, int]:
        from pyarrow.fs import FileType

        return {
            each.path[len(self.path) + 1 :]: each.size
            for each in sorted(self._list(recursive=True), key=lambda each: each.path)
            if each.type == FileType.File
        }

    def _list(self, *, recursive: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        return self.files.get_file_info(FileSelector(self.path, recursive=recursive, allow_not_found=True))

    def read(self, name: str) -> bytes | None:
        try:
            with self.files.open_input_stream(self._path_of(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        with self._writing(name) as stream:
            stream.write(text.encode())

    def checksum(self, name: str, on_read: Callable[[int], None] = lambda num_bytes: None) -> str:
        digest = xxhash.xxh3_128()
        with self.files.open_input_stream(self._path_of(name)) as stream:
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
                on_read(len(piece))
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        from pyarrow.fs import FileType

        path = self._path_of(name)
        found = self.files.get_file_info(path).type
        if found == FileType.Directory:
            self.files.delete_dir(path)
        elif found == FileType.File:
            self.files.delete_file(path)

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of a local folder, several at a time. Raises `OSError`."""

        def copy(name: str) -> None:
            with (folder / name).open("rb") as source, self._writing(name) as sink:
                shutil.copyfileobj(source, sink, PIECE_BYTES)

        _in_threads(copy, names)

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a local folder, several at a time, each whole or not at all. Raises `OSError`."""

        def copy(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
            try:
                with self.files.open_input_stream(self._path_of(name)) as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink, PIECE_BYTES)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)

        _in_threads(copy, names)

    def _writing(self, name: str) -> Any:
        path = self._path_of(name)
        self.files.create_dir(path.rpartition("/")[0], recursive=True)  # object stores need none, others do
        return self.files.open_output_stream(path)

    def _path_of(self, name: str) -> str:
        return f"{self.path}/{name}"


def run_folder(run: RunSection, name: str) -> Folder:
    """A folder in a run's, where all nodes find it."""
    if run.url is None:
        return LocalFolder(Path(run.path) / name)
    return RemoteFolder(joined(run.url, name))


class RunSection(Protocol):
    """What is read of the config's section `run`."""

    @property
    def path(self) -> str: ...

    @property
    def url(self) -> str | None: ...


def stored(run: RunSection, name: str, *, write: bool) -> str:
    """Where users find a folder that rank 0 has written into its copy of the run's folder: with a URL it is
    uploaded, by the rank with `write`. Raises `OSError`.
    """
    local, folder = Path(run.path) / name, run_folder(run, name)
    if isinstance(folder, RemoteFolder) and write:
        folder.parent.remove(name)
        *others, last = sorted(LocalFolder(local).sizes(), key=lambda file: file == LAST_OF_EXPORT)
        folder.upload(local, others)
        folder.upload(local, [last])
    return str(folder)


def on_this_node(run: RunSection, name: str) -> Path:
    """A folder in a run's, copied to this node's disk if it is behind a URL. Raises `OSError`."""
    local, folder = Path(run.path) / name, run_folder(run, name)
    if isinstance(folder, RemoteFolder):
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(local.with_name(f".{local.name}.lock")):  # of this node's ranks
            here = LocalFolder(local).sizes()
            missing = [file for file, size in folder.sizes().items() if here.get(file) != size]
            folder.download(missing, local)
    return local


def _in_threads(copy: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        for _ in pool.map(copy, names):
            pass
