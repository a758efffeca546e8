"""Snapshots of hub repositories: which files a run needs, whether the cache has them, downloading the rest.

`huggingface_hub` does the work: its cache is shared with all other programs, its locks let one process of a
node fetch a file, and with a commit as the revision it sends no request for files that it already has.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rayrlhf.hub.access import Access
from rayrlhf.hub.hub_errors import HubError, explained
from rayrlhf.hub.ids import HubId, snapshot_folder

SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")  # everything except weights
TEMPLATES = "additional_chat_templates/"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The first that exists holds the weights; an index lists the files that do.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
POLL_SECONDS = 0.5  # between two measurements of a download's progress
PROGRESS_SECONDS = 5.0  # between two console lines about it
STALLED_SECONDS = 300.0  # without a byte: the download is aborted
DISK_MARGIN = 64 * 2**20

T = TypeVar("T")


def small_files(names: Iterable[str]) -> list[str]:
    """Config, tokenizer, chat templates and code: the files that are read before the weights."""
    return sorted(
        name
        for name in names
        if name.endswith(SMALL_SUFFIXES)
        and ("/" not in name or name.startswith(TEMPLATES) or name.endswith(".py"))
    )


def weight_files(names: Iterable[str], read_index: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The weight files, in one format: safetensors if there are both. Empty if there are none."""
    there = set(names)
    adapter = [ADAPTER_WEIGHTS] if ADAPTER_WEIGHTS in there else []
    first = next((name for name in WEIGHTS if name in there), None)
    if first is None:
        return adapter
    if not first.endswith(".index.json"):
        return [first, *adapter]
    shards: Mapping[str, str] = read_index(first).get("weight_map", {})
    return sorted(set(shards.values())) + adapter


def cached_listing(cache: Path, hub_id: HubId) -> dict[str, int] | None:
    """Name -> bytes of all files of a pinned repository, as stored in the cache by an earlier request."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(
            hub_id.repo, repo_type=hub_id.kind, revision=hub_id.revision, cache_dir=cache
        )
    except CachedRepoTreeNotFoundError:
        return None
    return {file.path: file.size for file in files}


def complete_folder(cache: Path, hub_id: HubId, *, weights: bool) -> str | None:
    """The snapshot folder in this cache, if complete. Checks names only: huggingface_hub moves a file to its
    name once it is complete.
    """
    folder = snapshot_folder(cache, hub_id)
    if folder is None:
        return None
    listing = cached_listing(cache, hub_id)
    if listing is None:  # filled by an older huggingface_hub, which stored none
        listing = {str(path.relative_to(folder)): 0 for path in folder.rglob("*") if path.is_file()}
    wanted = small_files(listing)
    if not wanted or not _all_there(folder, wanted):
        return None
    if weights:
        heavy = weight_files(listing, lambda name: json.loads((folder / name).read_text()))
        if not heavy or not _all_there(folder, heavy):
            return None
    return str(folder)


def _all_there(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def fetch(cache: Path, hub_id: HubId, access: Access, *, weights: bool, say: Callable[[str], None]) -> str:
    """Download the needed files of a pinned model to the cache; returns its folder. Raises `HubError`."""
    listing = listed(cache, hub_id, access)
    folder = download(cache, hub_id, small_files(listing), access, say=say)
    if not weights:
        return folder
    heavy = weight_files(listing, lambda name: json.loads(Path(folder, name).read_text()))
    return download(cache, hub_id, heavy, access, say=say)


def listed(cache: Path, hub_id: HubId, access: Access) -> dict[str, int]:
    """Name -> bytes of all files of a pinned repository. Raises `HubError`."""
    listing = cached_listing(cache, hub_id)
    if listing is None:
        try:
            folder = Path(_snapshot(cache, hub_id, ["config.json", "README.md"], access, UpdateCounter()))
        except Exception as error:  # from huggingface_hub, its client, the disk
            raise explained(error, hub_id, access, cache) from error
        listing = cached_listing(cache, hub_id)
        if listing is None:  # offline, with a cache that an older huggingface_hub has filled
            listing = {str(path.relative_to(folder)): 0 for path in folder.rglob("*") if path.is_file()}
    return listing


def bytes_fetched(cache: Path, hub_id: HubId) -> int:
    """Bytes of that repository on disk, including partial files."""
    return _bytes_in(cache / hub_id.cache_name / "blobs")


def download(
    cache: Path,
    hub_id: HubId,
    names: list[str],
    access: Access,
    *,
    say: Callable[[str], None],
) -> str:
    """Download these files to the cache and return the snapshot folder. Existing files are not fetched again.
    Raises `HubError`.
    """
    listing = cached_listing(cache, hub_id) or {}
    folder = snapshot_folder(cache, hub_id)
    missing = [name for name in names if folder is None or not (folder / name).is_file()]
    size = sum(listing.get(name, 0) for name in missing)
    _check_disk(cache, hub_id, size)
    updates = UpdateCounter()
    what = f"{format_bytes(size)} in {len(missing)} file{'s' * (len(missing) != 1)}"
    try:
        return run_with_progress(
            lambda: _snapshot(cache, hub_id, names, access, updates),
            hub_id,
            measure=lambda: bytes_fetched(cache, hub_id),
            updates=updates,
            say=say if size else lambda _: None,
            what=what,
        )
    except Exception as error:  # from huggingface_hub, its client, the disk
        raise explained(error, hub_id, access, cache) from error


class UpdateCounter:
    """Counts the progress updates of a download, as a sign of life."""

    def __init__(self) -> None:
        self.count = 0


def run_with_progress(
    work: Callable[[], T],
    hub_id: HubId,
    *,
    measure: Callable[[], int],
    updates: UpdateCounter,
    say: Callable[[str], None],
    what: str,
) -> T:
    """Run the download `work` in a thread and report the bytes received; `measure` returns the bytes on disk.
    Raises what `work` raises, and `HubError` when there is no progress for `STALLED_SECONDS`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # re-raised by the waiting thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"fetch-{hub_id.repo}")
    before = measure()
    started = last_report = moved = time.monotonic()
    last = (before, 0)
    say(f"fetching {hub_id.repo}: {what}")
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        now, there = time.monotonic(), (measure(), updates.count)
        if there != last:
            last, moved = there, now
        if now - moved > STALLED_SECONDS:
            raise HubError(
                f"{hub_id}: no data for {STALLED_SECONDS:g} s, after {format_bytes(there[0] - before)} "
                f"of {what}. Fix: check the network and HF_ENDPOINT, then run the same command again: it "
                "resumes the download"
            )
        if now - last_report > PROGRESS_SECONDS:
            last_report = now
            say(f"fetching {hub_id.repo}: {format_bytes(there[0] - before)} of {what}")
    if errors:
        raise errors[0]
    say(f"fetched {hub_id.repo}: {format_bytes(measure() - before)} in {time.monotonic() - started:.0f} s")
    return results[0]


def _snapshot(cache: Path, hub_id: HubId, names: list[str], access: Access, updates: UpdateCounter) -> str:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            updates.count += 1

    return snapshot_download(
        hub_id.repo,
        repo_type=hub_id.kind,
        revision=hub_id.revision,
        cache_dir=cache,
        token=access.token,
        endpoint=access.endpoint,
        local_files_only=access.offline,
        allow_patterns=[_escaped(name) for name in names],
        tqdm_class=Silent,
    )


def _escaped(name: str) -> str:
    """A glob pattern that matches only this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _bytes_in(folder: Path) -> int:
    """Bytes on disk, including partial files."""
    total = 0
    for entry in _entries(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:  # renamed in the meantime
            continue
    return total


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except FileNotFoundError:
        return


def _check_disk(cache: Path, hub_id: HubId, size: int) -> None:
    """Raises `HubError` if the disk has too little free space."""
    place = cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size and free < size + DISK_MARGIN:
        raise HubError(
            f"{hub_id}: {format_bytes(size)} to fetch, but {cache} has {format_bytes(free)} free. Fix: free "
            "space there, or set HF_HOME to a folder on a larger disk"
        )


def format_bytes(size: int) -> str:
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size} B"
