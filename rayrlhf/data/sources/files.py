"""Resolves a source of the config to files: `type@path`, a bare path, a folder with splits, a glob."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.remote import local_copy
from rayrlhf.storage.urls import is_url

Split = Literal["train", "eval"]

# Suffixes of each type, its own first. `json` includes JSON Lines, since many data sets name them .json.
SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
}
TYPES = (*SUFFIXES, "dataset", "hub")

# Split names used for each purpose in a folder with named splits, in order of preference.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "eval": ("test", "eval", "validation")}
SAVED_DATASET = "state.json"  # written by `datasets.Dataset.save_to_disk`
SAVED_DATASET_DICT = "dataset_dict.json"  # written by `datasets.DatasetDict.save_to_disk`
# owner/name, owner/name/configuration, each optionally with @revision and :split.
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<configuration>[\w.-]+))?"
    r"(@(?P<revision>\w[\w./-]*))?(:(?P<split>[\w.\[\]%|-]+))?"
)


@dataclass(frozen=True)
class DataFile:
    """One file, or one folder made by `save_to_disk`, and how to read it."""

    type: str  # one of TYPES
    path: (
        str  # absolute; for a data set of the hub its id, with :split or :name|name for the first that exists
    )


def resolve_source(source: str, split: Split, split_name: str | None = None) -> list[DataFile]:
    """The files of `type@path`, or of a bare path whose suffix determines the type, sorted by name.

    The path may be a URL (`sources.remote`), which is copied first; a file, a glob, or a folder. All files of
    a folder are read unless they are named after splits: then `train` uses train.* and `eval` uses test.*,
    else eval.*, else validation.*; or the split `split_name`. `owner/name`, also with /configuration and
    :split, is a data set of the Hugging Face hub if there is no such path; its availability is checked when
    it is read. Raises `DataError` if nothing matches, listing what exists instead.
    """
    names = SPLIT_NAMES[split] if split_name is None else (split_name,)
    if source.startswith("hub@"):
        if not HUB_ID.fullmatch(source[4:]):
            raise DataError(
                f"{source}: wanted an id as hub@owner/name, hub@owner/name/configuration:split or "
                "hub@owner/name@revision:split"
            )
        return [_hub_file(source[4:], names)]
    type_, path = _type_and_path(source)
    if type_ is None and not os.path.exists(path) and _is_hub_id(source):
        return [_hub_file(source, names)]
    try:
        return _resolve(source, type_, path, split, names)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error


def hub_id_of(source: str) -> str | None:
    """The id with its suffixes, if a source is a data set of the hub, else None."""
    if source.startswith("hub@"):
        return source[4:] if HUB_ID.fullmatch(source[4:]) else None
    if is_url(source.rpartition("@")[2]) or is_url(source):
        return None
    type_, path = _type_and_path(source)
    return source if type_ is None and not os.path.exists(path) and _is_hub_id(source) else None


def _is_hub_id(source: str) -> bool:
    """Whether it looks like an id and not like a path: no local path begins with it."""
    return (
        HUB_ID.fullmatch(source) is not None
        and _type_of(source) is None
        and not os.path.exists(source.split("/")[0])
    )


def _hub_file(hub_id: str, names: Sequence[str]) -> DataFile:
    return DataFile("hub", hub_id if ":" in hub_id else f"{hub_id}:{'|'.join(names)}")


def _resolve(source: str, type_: str | None, path: str, split: Split, names: Sequence[str]) -> list[DataFile]:
    if glob.has_magic(path) and not os.path.exists(path):
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not paths:
            raise DataError(f"{source}: no file matches this pattern; check the path (it is {path})")
        return _files(source, type_, paths, "the files that match")
    if not os.path.exists(path):
        raise DataError(f"{source}: no such file or folder; {_nearest_existing(path)}")
    if os.path.isfile(path):
        return _files(source, type_, [path], "the file")
    if type_ in (None, "dataset") and (found := _saved_dataset(source, path, split, names)):
        return found
    if type_ == "dataset":
        raise DataError(
            f"{source}: {path} was not made by save_to_disk (it has no {SAVED_DATASET} or "
            f"{SAVED_DATASET_DICT}); for a folder of data files say jsonl@, json@, csv@, parquet@ or arrow@"
        )
    return _files(source, type_, _folder_paths(source, type_, path, split, names), "the folder's files")


def _type_and_path(source: str) -> tuple[str | None, str]:
    """Splits off the type. An "@" after a slash or a dot is part of the path."""
    head, at, tail = source.partition("@")
    if not at or re.search(r"[/.\\]", head):
        type_, path = None, source
    elif head in TYPES:
        type_, path = head, tail
    elif os.path.exists(source):
        type_, path = None, source
    else:
        near = difflib.get_close_matches(head, TYPES, n=1)
        hint = f"did you mean {near[0]}@{tail}?" if near else f"the types are: {', '.join(TYPES)}"
        raise DataError(f"{source}: unknown type {head!r}; {hint}")
    if is_url(path):
        return type_, local_copy(source, path)
    if not path:
        raise DataError(f"{source!r} names no path; wanted type@path, such as jsonl@data/train.jsonl")
    return type_, os.path.abspath(os.path.expanduser(path))


def _files(source: str, type_: str | None, paths: Sequence[str], what: str) -> list[DataFile]:
    if type_ == "dataset":
        raise DataError(f"{source}: dataset@ wants a folder made by save_to_disk, not a file")
    if type_ is not None:
        # A single file is read as the given type, whatever its suffix; of several, those with its suffixes.
        matching = paths if len(paths) == 1 else [p for p in paths if p.endswith(SUFFIXES[type_])]
        if not matching:
            raise DataError(
                f"{source}: none of {what} ends in {' or '.join(SUFFIXES[type_])}; there are: {_names(paths)}"
            )
        return [DataFile(type_, path) for path in matching]
    files = [DataFile(found, path) for path in paths if (found := _type_of(path)) is not None]
    if not files:
        raise DataError(
            f"{source}: no type is known for {_names(paths)}; name it, as in jsonl@{source} "
            f"(types: {', '.join(TYPES)})"
        )
    if len({file.type for file in files}) > 1:
        raise DataError(
            f"{source}: {what} are of several types ({', '.join(sorted({f.type for f in files}))}); "
            f"name one, as in {files[0].type}@{source}"
        )
    return files


def _type_of(path: str) -> str | None:
    return next((type_ for type_, suffixes in SUFFIXES.items() if path.endswith(suffixes)), None)


def _folder_paths(
    source: str, type_: str | None, folder: str, split: Split, wanted_names: Sequence[str]
) -> list[str]:
    every = sorted(
        entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")
    )
    suffixes = SUFFIXES[type_] if type_ else tuple(s for each in SUFFIXES.values() for s in each)
    paths = [path for path in every if path.endswith(suffixes)]
    if not paths:
        there = _names([entry.path for entry in os.scandir(folder)])
        raise DataError(
            f"{source}: no {' or '.join(dict.fromkeys(suffixes))} file in {folder}; it holds: {there}"
        )
    known = [name for names in SPLIT_NAMES.values() for name in names]
    by_split = {name: [p for p in paths if _is_split(p, name)] for name in [*known, *wanted_names]}
    given_by_name = any(name not in known for name in wanted_names)
    if not any(by_split.values()) and not given_by_name:
        return paths
    for name in wanted_names:
        if by_split[name]:
            return by_split[name]
    wanted = " or ".join(f"{name}.*" for name in wanted_names)
    raise DataError(
        f"{source}: data.{split} takes {wanted} from a folder with splits, but it holds: {_names(paths)}; "
        "name the file itself"
    )


def _is_split(path: str, name: str) -> bool:
    """train.jsonl, train-00000-of-00002.parquet and train_sft.csv are `train`; training.jsonl is not."""
    return re.match(rf"{re.escape(name)}[._-]", os.path.basename(path)) is not None


def _saved_dataset(source: str, folder: str, split: Split, names: Sequence[str]) -> list[DataFile]:
    if os.path.exists(os.path.join(folder, SAVED_DATASET)):
        return [DataFile("dataset", folder)]
    splits_path = Path(folder, SAVED_DATASET_DICT)
    if not splits_path.exists():
        return []
    try:
        splits = json.loads(splits_path.read_text())["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{splits_path} is broken ({error!r}); save the data set again") from error
    for name in names:
        if name in splits:
            return [DataFile("dataset", os.path.join(folder, name))]
    raise DataError(
        f"{source}: data.{split} takes the split {' or '.join(names)}, but this data set has: "
        f"{', '.join(splits)}; name one, as in dataset@{folder}/{splits[0] if splits else '<split>'}"
    )


def _nearest_existing(path: str) -> str:
    """The deepest existing parent of the path, with close matches, to hint at typos."""
    parent = Path(path).parent
    while not parent.exists():
        parent = parent.parent
    there = (
        sorted(entry.name for entry in parent.iterdir())
        if os.access(parent, os.R_OK) and parent.is_dir()
        else []
    )
    missing = Path(path).relative_to(parent).parts[0] if parent in Path(path).parents else Path(path).name
    near = difflib.get_close_matches(missing, there, n=1)
    return f"did you mean {parent / near[0]}?" if near else f"{parent} exists and holds: {_names(there)}"


def _names(paths: Sequence[str], limit: int = 8) -> str:
    names = [os.path.basename(path) for path in paths]
    shown = ", ".join(names[:limit]) or "nothing"
    return shown + (f", … ({len(names)} in all)" if len(names) > limit else "")
