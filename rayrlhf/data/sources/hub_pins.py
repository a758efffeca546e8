"""Pins hub data sets to commits, once, and fetches their files: on the driver, before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rayrlhf.config.data import SourceConfig
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.files import HUB_ID, hub_id_of
from rayrlhf.data.sources.hub_files import load_splits
from rayrlhf.hub.access import access_from_env
from rayrlhf.hub.hub_errors import HubError, recognised
from rayrlhf.hub.ids import COMMIT, HubId, cache_folder
from rayrlhf.hub.resolve import commit_of
from rayrlhf.hub.snapshots import UpdateCounter, bytes_fetched, listed, run_with_progress

C = TypeVar("C", bound=Any)
Say = Callable[[str], None]


def data_sources(data: Any) -> Iterator[tuple[str, SourceConfig]]:
    """(key below `data`, source) of every source in a section `data`."""
    for split in ("train", "eval"):
        for index, source in enumerate(getattr(data, split)):
            yield f"{split}.{index}", source
    ptx = getattr(data, "ptx", None)
    for index, source in enumerate(ptx.sources if ptx is not None else ()):
        yield f"ptx.sources.{index}", source


def pin_data(data: C, began_with: Any, say: Say, problems: list[str]) -> C:
    """The section `data` with its hub data sets pinned to commits and fetched. `began_with`: the same section
    in the run's config.yaml of an earlier start, whose commits are kept. Failures are added to `problems`.
    """
    earlier = {HUB_ID.fullmatch(path) for path in _earlier_ids(began_with)}
    kept = {found["repo"]: found["revision"] for found in earlier if found is not None}
    pins: dict[str, str] = {}
    for key, source in data_sources(data):
        text = hub_id_of(source.path)
        parts = HUB_ID.fullmatch(text) if text is not None else None
        if parts is None:
            continue
        try:
            pins[key] = _pinned(parts, kept, say)
        except (HubError, DataError) as error:
            problems.append(f"data.{key}: {error}")
    return _with_sources(data, pins)


def _pinned(parts: Any, kept: dict[str, str], say: Say) -> str:
    """The source with a commit; unchanged in offline mode if only the cache of the library `datasets` has it.
    Raises `HubError` and `DataError`.
    """
    access, cache = access_from_env(), cache_folder(os.environ)
    repo, revision = parts["repo"], parts["revision"]
    hub_id = HubId(repo, revision or kept.get(repo), "dataset")
    where = f"{repo}/{parts['configuration']}" if parts["configuration"] else repo
    split = f":{parts['split']}" if parts["split"] else ""
    try:
        commit = commit_of(hub_id, access, cache)
    except HubError:
        if not access.offline:
            raise
        load_splits(where)
        return f"hub@{where}{split}"
    pinned = hub_id.at(commit)
    listed(cache, pinned, access)  # gives a clear error if access is denied, unlike `datasets`
    try:
        run_with_progress(
            lambda: load_splits(f"{where}@{commit}"),
            pinned,
            measure=lambda: bytes_fetched(cache, pinned) + _converted(repo),
            updates=UpdateCounter(),
            say=say,
            what="a data set",
        )
    except DataError as error:
        raise recognised(error, pinned, access, cache) or error from error
    return f"hub@{where}@{commit}{split}"


def _converted(repo: str) -> int:
    """Bytes of this data set that the library `datasets` has written to its own cache files."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / repo.replace("/", "___").lower()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _earlier_ids(section: Any) -> Iterator[str]:
    """Pinned ids of an earlier start."""
    if not isinstance(section, dict):
        return
    ptx = section.get("ptx")
    lists = [section.get("train"), section.get("eval"), ptx.get("sources") if isinstance(ptx, dict) else None]
    for entry in (entry for entries in lists if isinstance(entries, list) for entry in entries):
        path = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(path, str) and path.startswith("hub@"):
            found = HUB_ID.fullmatch(path[4:])
            if found is not None and COMMIT.fullmatch(found["revision"] or ""):
                yield path[4:]


def _with_sources(data: C, paths: dict[str, str]) -> C:
    changes: dict[str, Any] = {}
    for split in ("train", "eval"):
        if any(key.startswith(f"{split}.") for key in paths):
            changes[split] = _replaced(getattr(data, split), split, paths)
    if any(key.startswith("ptx.") for key in paths):
        changes["ptx"] = data.ptx.model_copy(
            update={"sources": _replaced(data.ptx.sources, "ptx.sources", paths)}
        )
    return data.model_copy(update=changes) if changes else data


def _replaced(sources: list[SourceConfig], key: str, paths: dict[str, str]) -> list[SourceConfig]:
    return [
        source.model_copy(update={"path": paths[f"{key}.{index}"]}) if f"{key}.{index}" in paths else source
        for index, source in enumerate(sources)
    ]
