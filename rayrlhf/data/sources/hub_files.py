"""Data sets of the Hugging Face hub, or of its cache on a machine without a network.

Only the driver fetches them; for the reading tasks on all nodes it writes a copy to the run's folder.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.files import HUB_ID
from rayrlhf.hub.ids import COMMIT


def load_hub_dataset(path: str) -> Any:
    """The `datasets.Dataset` of `owner/name[/configuration][@revision]:split`; with `:a|b` the first existing
    split.

    Raises `DataError` that says what was tried.
    """
    hub_id, _, split = path.partition(":")
    splits = load_splits(hub_id)
    wanted = split.split("|")
    for each in wanted:
        if each in splits:
            return splits[each]
    raise DataError(
        f"{hub_id} has no split {' or '.join(wanted)}; it has: {', '.join(splits)}; "
        f"name one, as in {hub_id}:{next(iter(splits), 'train')}, or with data.train_split or data.eval_split"
    )


def load_splits(hub_id: str) -> Any:
    """All splits of `owner/name[/configuration][@revision]`. Raises `DataError`."""
    import datasets

    datasets.disable_progress_bars()
    parts = HUB_ID.fullmatch(hub_id)
    assert parts is not None, hub_id
    repo, configuration, revision = parts["repo"], parts["configuration"], parts["revision"]
    options: dict[str, Any] = {"revision": revision} if revision else {}
    shown = [repr(text) for text in (repo, configuration) if text]
    asked = f"datasets.load_dataset({', '.join([*shown, *(f'{k}={v!r}' for k, v in options.items())])})"
    try:
        return datasets.load_dataset(repo, configuration, **options)
    except Exception as error:  # hub, network, cache and file formats may raise anything
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        raise DataError(
            f"{hub_id} is no local file or folder, and no data set available from the Hugging Face hub"
            f"{' (HF_HUB_OFFLINE is set: only the cache was searched)' if offline else ''}: "
            f"{asked} raised {type(error).__name__}: {_first_line(error)}; "
            "check the path or the id, or download the data set to the cache first"
        ) from error


def shared_copy(path: str, folder: Path) -> str:
    """Writes the rows of `load_hub_dataset(path)` to a folder below `folder`, which all nodes share: they
    need neither a network nor a token. A pinned data set is copied once. Raises `DataError`.
    """
    copy = folder / re.sub(r"[^\w.@-]+", "-", path)
    is_pinned = COMMIT.fullmatch(path.partition(":")[0].partition("@")[2]) is not None
    if copy.is_dir() and is_pinned:
        return str(copy)
    dataset = load_hub_dataset(path)
    partial = folder / f".{copy.name}.partial-{os.getpid()}"
    try:
        dataset.save_to_disk(str(partial))
        shutil.rmtree(copy, ignore_errors=True)
        partial.rename(copy)
    except OSError as error:
        raise DataError(f"{path} cannot be copied to {copy}: {error}; free space there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(copy)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
