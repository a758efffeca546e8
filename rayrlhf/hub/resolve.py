"""Pins a hub id to a commit, once, and checks that the repository has the files that the run needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from rayrlhf.hub.access import Access, access_from_env
from rayrlhf.hub.hub_errors import HubError, explained, host_of
from rayrlhf.hub.ids import HubId, cache_folder, parse_id
from rayrlhf.hub.snapshots import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    complete_folder,
    download,
    fetch,
    listed,
    small_files,
    weight_files,
)

MAX_SHOWN = 6  # names in a message


def resolve(
    hub_id: HubId,
    access: Access,
    cache: Path,
    *,
    say: Callable[[str], None],
    needs_tokenizer: bool,
    may_be_adapter: bool = False,
) -> HubId:
    """The pinned id, with its config and tokenizer in the cache. If the hub cannot be reached, the revision
    is taken from the cache. Raises `HubError`.
    """
    pinned = hub_id.at(commit_of(hub_id, access, cache))
    if not complete_folder(cache, pinned, weights=False):
        listing = listed(cache, pinned, access)
        download(cache, pinned, small_files(listing), access, say=say)
    _check_contents(pinned, access, cache, needs_tokenizer=needs_tokenizer, may_be_adapter=may_be_adapter)
    if not hub_id.is_pinned:
        say(f"{hub_id} pinned to commit {str(pinned.revision)[:12]}")
    return pinned


def commit_of(hub_id: HubId, access: Access, cache: Path) -> str:
    """The commit of the revision. Raises `HubError`."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    if hub_id.is_pinned:
        return str(hub_id.revision)
    logging.set_verbosity_error()  # huggingface_hub logs a warning where the hub cannot be reached
    api = HfApi(endpoint=access.endpoint, token=access.token)
    try:
        resolved = api.resolve_revision(
            hub_id.repo,
            repo_type=hub_id.kind,
            revision=hub_id.revision,
            cache_dir=cache,
            local_files_only=access.offline,
        )
    except Exception as error:  # from huggingface_hub, its client, the disk
        raise explained(error, hub_id, access, cache) from error
    return resolved.resolved


def _check_contents(
    hub_id: HubId, access: Access, cache: Path, *, needs_tokenizer: bool, may_be_adapter: bool
) -> None:
    """Raises `HubError` for a repository without a config, weights or (if needed) a tokenizer."""
    listing = listed(cache, hub_id, access)
    what = f"the model {hub_id} of {host_of(access.endpoint)}"
    there = ", ".join(sorted(listing)[:MAX_SHOWN]) + (", …" if len(listing) > MAX_SHOWN else "")
    if may_be_adapter and ADAPTER_CONFIG in listing:
        return
    if "config.json" not in listing:
        if ADAPTER_CONFIG in listing:
            raise HubError(
                f"{what} is an adapter, not a full model. Fix: merge it first, with "
                f"`rayrlhf merge-lora {hub_id} OUT`, and use that folder"
            )
        raise HubError(f"{what} has no config.json; it holds: {there}. Fix: name a Hugging Face checkpoint")
    folder = cache / hub_id.cache_name / "snapshots" / str(hub_id.revision)
    if not weight_files(listing, lambda name: json.loads((folder / name).read_text(encoding="utf-8"))):
        raise HubError(
            f"{what} has no model.safetensors and no pytorch_model.bin, single or sharded; it holds: "
            f"{there}. Fix: name a repository with weights for transformers, not one of another format"
        )
    if needs_tokenizer and not any(name in listing for name in TOKENIZER_FILES):
        raise HubError(
            f"{what} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, …); it holds: {there}. Fix: name a "
            "repository with one, or download this one to a folder and add a tokenizer"
        )


def folder_of(
    text: str, name: str, *, say: Callable[[str], None], weights: bool = True, may_be_adapter: bool = False
) -> str:
    """The folder that a command's argument or config key `name` refers to, fetched if it is an id.

    For commands that load a model without a driver that has pinned it. Raises `HubError`.
    """
    if Path(text).is_dir():
        return text
    hub_id = parse_id(text)
    if isinstance(hub_id, str):
        raise HubError(no_folder(name, text, hub_id))
    access, cache = access_from_env(), cache_folder(os.environ)
    try:
        pinned = resolve(
            hub_id, access, cache, say=say, needs_tokenizer=not may_be_adapter, may_be_adapter=may_be_adapter
        )
        return fetch(cache, pinned, access, weights=weights, say=say)
    except HubError as error:
        raise HubError(f"{name}={text}: {error}") from error


def no_folder(name: str, text: str, why_no_id: str) -> str:
    return (
        f"{name}={text}: no such folder (looked from {Path.cwd()}), and not a hub id, because "
        f"{why_no_id}. Fix: give the path of a Hugging Face checkpoint folder, or owner/name"
    )


def base_of(adapter: Path) -> str | None:
    """The base model (folder or id) named in the adapter's config; None if it names none.

    Raises `HubError` for a config that cannot be read.
    """
    file = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{file} cannot be read: {error}. Fix: save the adapter again") from error
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or Path(base).is_dir() or not revision:
        return base or None
    return f"{base}@{revision}"
