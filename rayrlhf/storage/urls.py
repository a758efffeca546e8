"""URLs of files and folders in object stores, such as s3://bucket/runs, as text."""

from __future__ import annotations

import re

URL = re.compile(r"[a-z][a-z0-9+.-]*://")
CREDENTIALS = re.compile(r"://[^/]*@")


def is_url(path: str) -> bool:
    return URL.match(path) is not None


def without_credentials(text: str) -> str:
    return CREDENTIALS.sub("://***@", text)


def has_credentials(url: str) -> bool:
    """Whether a URL holds a user or password, which a run would write into its folder."""
    return CREDENTIALS.search(url) is not None


def joined(url: str, name: str) -> str:
    """The URL of something in a folder; a query, such as Arrow's ?endpoint_override=, stays at the end.

    >>> joined("s3://bucket/runs/?region=eu-west-1", "first")
    's3://bucket/runs/first?region=eu-west-1'
    """
    folder, mark, query = url.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def parent(url: str) -> str:
    """The URL of the folder that something is in.

    >>> parent("s3://bucket/runs/first?region=eu-west-1")
    's3://bucket/runs?region=eu-west-1'
    """
    folder, mark, query = url.partition("?")
    return f"{folder.rstrip('/').rpartition('/')[0]}{mark}{query}"
