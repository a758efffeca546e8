"""What of a repository a run needs, whether a cache has it, and fetching what is missing.

`huggingface_hub` does the work: its cache is shared with all other programs, its locks let one process of a
node fetch a file, and with a commit as the revision it asks the hub nothing about what it has already.
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
from rayrlhf.hub.errors import HubError, explained
from rayrlhf.hub.ids import HubId, snapshot_folder

SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")  # all but the weights
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
# The first that is there holds the weights; an index names the files that do.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
POLL_SECONDS = 0.5  # between two looks at how far a download has come
PROGRESS_SECONDS = 5.0  # between two lines about it
STALLED_SECONDS = 300.0  # without a byte: then it is given up
DISK_MARGIN = 64 * 2**20

T = TypeVar("T")


def small_files(names: Iterable[str]) -> list[str]:
    """Config, tokenizer, chat templates and code: what is read before the weights."""
    return sorted(
        name
        for name in names
        if name.endswith(SMALL_SUFFIXES)
        and ("/" not in name or name.startswith(TEMPLATES) or name.endswith(".py"))
    )


def weight_files(names: Iterable[str], read_index: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The files with the weights, in one format: safetensors where there are both. Empty where there are
    none.
    """
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
    """Name -> bytes of all files of a pinned repository, as the hub has told them to this cache before."""
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
    """The snapshot in this cache, if it has all that is needed. Looks at names alone: huggingface_hub puts a
    file under its name when it is whole.
    """
    folder = snapshot_folder(cache, hub_id)
    if folder is None:
        return None
    listing = cached_listing(cache, hub_id)
    if listing is None:  # filled by an earlier huggingface_hub, which kept none
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
    """Have in the cache what is needed of a pinned model, and return its folder. Raises `HubError`."""
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
        except Exception as error:  # of huggingface_hub, its client, the disk
            raise explained(error, hub_id, access, cache) from error
        listing = cached_listing(cache, hub_id)
        if listing is None:  # without a network, from a cache that an earlier huggingface_hub has filled
            listing = {str(path.relative_to(folder)): 0 for path in folder.rglob("*") if path.is_file()}
    return listing


def bytes_fetched(cache: Path, hub_id: HubId) -> int:
    """Of that repository, half fetched files included."""
    return _bytes_in(cache / hub_id.cache_name / "blobs")


def download(
    cache: Path,
    hub_id: HubId,
    names: list[str],
    access: Access,
    *,
    say: Callable[[str], None],
) -> str:
    """Have these files in the cache and return the snapshot's folder. What is there is not fetched again.
    Raises `HubError`.
    """
    listing = cached_listing(cache, hub_id) or {}
    folder = snapshot_folder(cache, hub_id)
    missing = [name for name in names if folder is None or not (folder / name).is_file()]
    size = sum(listing.get(name, 0) for name in missing)
    _check_disk(cache, hub_id, size)
    news = UpdateCounter()
    what = f"{format_bytes(size)} in {len(missing)} file{'s' * (len(missing) != 1)}"
    try:
        return run_with_progress(
            lambda: _snapshot(cache, hub_id, names, access, news),
            hub_id,
            measure=lambda: bytes_fetched(cache, hub_id),
            news=news,
            say=say if size else lambda _: None,
            what=what,
        )
    except Exception as error:  # of huggingface_hub, its client, the disk
        raise explained(error, hub_id, access, cache) from error


class UpdateCounter:
    """Counts what a download reports of itself."""

    def __init__(self) -> None:
        self.count = 0


def run_with_progress(
    work: Callable[[], T],
    hub_id: HubId,
    *,
    measure: Callable[[], int],
    news: UpdateCounter,
    say: Callable[[str], None],
    what: str,
) -> T:
    """Do `work`, which fetches, and say how many bytes have come (`measure`, of all on the disk). Raises what
    it raises, and `HubError` when nothing has moved for `STALLED_SECONDS`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"fetch-{hub_id.repo}")
    before = measure()
    started = told = moved = time.monotonic()
    last = (before, 0)
    say(f"fetching {hub_id.repo}: {what}")
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        now, there = time.monotonic(), (measure(), news.count)
        if there != last:
            last, moved = there, now
        if now - moved > STALLED_SECONDS:
            raise HubError(
                f"{hub_id}: nothing has come for {STALLED_SECONDS:g} s, after {format_bytes(there[0] - before)} "
                f"of {what}. Fix: look at the network and at HF_ENDPOINT; what is there is kept, so that the "
                "same command goes on"
            )
        if now - told > PROGRESS_SECONDS:
            told = now
            say(f"fetching {hub_id.repo}: {format_bytes(there[0] - before)} of {what}")
    if errors:
        raise errors[0]
    say(f"fetched {hub_id.repo}: {format_bytes(measure() - before)} in {time.monotonic() - started:.0f} s")
    return results[0]


def _snapshot(cache: Path, hub_id: HubId, names: list[str], access: Access, news: UpdateCounter) -> str:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            news.count += 1

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
    """As a pattern that fits this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _bytes_in(folder: Path) -> int:
    """On the disk, half fetched files included."""
    total = 0
    for entry in _entries(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:  # renamed since
            continue
    return total


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except FileNotFoundError:
        return


def _check_disk(cache: Path, hub_id: HubId, size: int) -> None:
    """Raises `HubError` where it will not fit."""
    place = cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size and free < size + DISK_MARGIN:
        raise HubError(
            f"{hub_id}: {format_bytes(size)} to fetch, but {cache} has {format_bytes(free)} free. Fix: make room "
            "there, or set HF_HOME to a folder on a larger disk"
        )


def format_bytes(size: int) -> str:
    for unit, bytes_each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size} B"
