"""Data behind URLs such as s3://bucket/train.jsonl: copied once into this machine's cache."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrlhf.data.rows.row import DataError
from rayrlhf.storage.file_systems import file_system
from rayrlhf.storage.urls import has_credentials, without_credentials

CACHE = Path("~/.cache/rayrlhf/data")  # or RAYRLHF_DATA_CACHE
COPY_THREADS = 8


def local_copy(source: str, url: str) -> str:
    """Path of a local copy of a file, of a folder, or of the files that a pattern matches.

    It is made again if names, sizes or times of modification have changed.

    Args:
        source: as in the config, for messages.

    Raises:
        DataError: if there is nothing, nothing can be read, or the URL has a password.
    """
    if has_credentials(url):
        raise DataError(
            f"{without_credentials(source)}: the URL has credentials, which the run would write into "
            "its folder; set them in the environment (AWS_ACCESS_KEY_ID, …) or in the provider's own file"
        )
    try:
        files, path, infos = _found(url)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    if not infos:
        raise DataError(f"{source}: there is no such file, folder or match")
    is_file = len(infos) == 1 and infos[0].path == path
    base = os.path.dirname(path) if is_file else _folder_of(path)
    relative = [os.path.relpath(info.path, base) for info in infos]
    if any(name.startswith("..") for name in relative):
        raise DataError(f"{source}: a name leads out of the folder: {relative}")
    described = [[info.path, info.size, info.mtime_ns] for info in infos]
    key = hashlib.sha256(json.dumps([url, described]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("RAYRLHF_DATA_CACHE") or CACHE).expanduser() / key
    folder = cache / (os.path.basename(base.rstrip("/")) or "data")
    if not cache.exists():
        try:
            _copy(files, [info.path for info in infos], relative, cache, folder)
        except OSError as error:
            raise DataError(f"{source} cannot be copied to {cache}: {error}") from error
    return str(folder / relative[0] if is_file else folder)


def _found(url: str) -> tuple[Any, str, list[Any]]:
    """(file system, path, its files): of a file itself, of a folder or a pattern all, in order."""
    from pyarrow import fs

    files, path = _file_system(url)
    path = path.rstrip("/")
    if not glob.has_magic(path):
        info = files.get_file_info(path)
        if info.type == fs.FileType.File:
            return files, path, [info]
    selector = fs.FileSelector(_folder_of(path), recursive=True, allow_not_found=True)
    infos = sorted(
        (info for info in files.get_file_info(selector) if info.type == fs.FileType.File),
        key=lambda info: info.path,
    )
    if glob.has_magic(path):
        infos = [info for info in infos if fnmatch.fnmatchcase(info.path, path)]
    return files, path, [info for info in infos if not os.path.basename(info.path).startswith(".")]


def _file_system(url: str) -> tuple[Any, str]:
    pattern = ""
    if glob.has_magic(url):  # not in a URI as Arrow parses it
        head = _folder_of(url)
        url, pattern = head, url[len(head) :]
    files, path = file_system(url)
    return files, path + pattern


def _folder_of(path: str) -> str:
    """The path up to the first part with a pattern."""
    parts = path.split("/")
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:fixed])


def _copy(files: Any, paths: Sequence[str], names: Sequence[str], cache: Path, folder: Path) -> None:
    """Copy into another folder, which then gets the name: an interrupted copy is never used."""
    from concurrent.futures import ThreadPoolExecutor

    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache.parent, prefix=f"{cache.name}-"))
    try:

        def copy(path: str, name: str) -> None:
            target = partial / folder.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.open_input_stream(path) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)

        with ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(copy, paths, names))
        try:
            partial.rename(cache)
        except OSError:
            if not cache.exists():  # another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
