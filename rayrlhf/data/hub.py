"""Data sets of the Hugging Face hub, or of its cache on a machine without a network."""

from __future__ import annotations

import os
from typing import Any

from rayrlhf.data.rows import DataError


def load_hub_dataset(path: str) -> Any:
    """The `datasets.Dataset` of `owner/name[/configuration]:split`; of `:a|b` the first split that exists.

    Raises `DataError` saying what was tried.
    """
    import datasets

    datasets.disable_progress_bars()
    hub_id, _, split = path.partition(":")
    owner, name, *configuration = hub_id.split("/")
    asked = f"datasets.load_dataset({', '.join(map(repr, [f'{owner}/{name}', *configuration]))})"
    try:
        splits: Any = datasets.load_dataset(f"{owner}/{name}", next(iter(configuration), None))
    except Exception as error:  # the hub, the network, the cache and foreign formats raise what they like
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        raise DataError(
            f"{hub_id} is no file or folder here, and no data set that can be had from the Hugging Face hub"
            f"{' (HF_HUB_OFFLINE is set: only its cache was looked at)' if offline else ''}: "
            f"{asked} raised {type(error).__name__}: {_first_line(error)}; "
            "check the path or the id, or put the data set into the cache first"
        ) from error
    wanted = split.split("|")
    for each in wanted:
        if each in splits:
            return splits[each]
    raise DataError(
        f"{hub_id} has no split {' or '.join(wanted)}; it has: {', '.join(splits)}; "
        f"name one, as in {hub_id}:{next(iter(splits), 'train')}, or with data.train_split or data.eval_split"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
