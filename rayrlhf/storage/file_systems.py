"""The file systems behind URLs.

Arrow's file systems know s3, gs, abfs and hdfs, with the credentials of their usual environment variables and
files; other schemes are those of installed fsspec packages.
"""

from __future__ import annotations

from typing import Any


def file_system(url: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a URL without a pattern, and the path in it.

    Raises `OSError`, `ValueError` or `ImportError` if there is none for its scheme.
    """
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(url)
    except ValueError:  # not a scheme of Arrow
        from fsspec.core import url_to_fs

        other, path = url_to_fs(url)
        return fs.PyFileSystem(fs.FSSpecHandler(other)), path
