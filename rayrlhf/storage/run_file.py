"""Files of a run that the driver writes and tasks on other nodes read, such as its prepared rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from rayrlhf.storage.folder import LocalFolder, RemoteFolder, RunSection, run_folder
from rayrlhf.storage.urls import parent


@dataclass(frozen=True)
class RunFile(os.PathLike[str]):
    """A path that a node which lacks the file, or has one with other contents, fetches as it is opened."""

    path: str  # the same on all nodes
    url: str | None = None  # None if all nodes share the folder
    xxh3: str = ""  # of its contents, with a URL

    def __fspath__(self) -> str:
        if self.url is not None:
            self._fetch(Path(self.path), self.url)
        return self.path

    def __str__(self) -> str:
        return self.url or self.path

    def _fetch(self, file: Path, url: str) -> None:
        """Raises `OSError`."""
        mark = _mark(file)
        if _text(mark) == self.xxh3 and file.is_file():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(mark.with_suffix(".lock")):  # of this node's tasks
            if _text(mark) != self.xxh3 or not file.is_file():
                RemoteFolder(parent(url)).download([file.name], file.parent)
                mark.write_text(self.xxh3)


def run_file(run: RunSection, name: str) -> RunFile:
    """A file in the driver's copy of the run's folder, for all nodes: with a URL it is uploaded, unless it is
    there already. Raises `OSError`.
    """
    path = Path(run.path) / name
    folder = run_folder(run, name).parent
    if not isinstance(folder, RemoteFolder):
        return RunFile(str(path.absolute()))
    xxh3 = LocalFolder(path.parent).checksum(path.name)
    mark = _mark(path)
    if folder.read(mark.name) != xxh3.encode():
        folder.upload(path.parent, [path.name])
        folder.write(mark.name, xxh3)
    mark.write_text(xxh3)
    return RunFile(str(path.absolute()), folder.child(path.name).url, xxh3)


def fetched(run: RunSection, name: str) -> Path:
    """This node's path of a file in a run's folder, which it gets if the bucket has it. Raises `OSError`."""
    path, folder = Path(run.path) / name, run_folder(run, name).parent
    if isinstance(folder, RemoteFolder) and not path.is_file() and path.name in folder.sizes():
        folder.download([path.name], path.parent)
    return path


def _mark(file: Path) -> Path:
    return file.with_name(f".{file.name}.xxh3")


def _text(file: Path) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None
