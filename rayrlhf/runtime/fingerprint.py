"""Fingerprint of config and data, stored with the results; resuming is refused when it differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrlhf.runtime.preflight import InputError
from rayrlhf.storage.atomic import write_atomically

MISSING = "nothing"
# Keys that may change between starts, because they do not affect the rows.
OPERATIONAL_KEYS = {
    *("num_replicas", "num_processes", "max_batch", "max_concurrent", "max_tokens_per_batch"),
    *("timeout_seconds", "retries", "max_failed_fraction", "urls", "headers", "max_response_bytes"),
}


def check_identity(file: Path, identity: Mapping[str, Any], *, resume: str) -> None:
    """Write `identity` (a tree of plain values) to `file`, or compare it with that of an earlier start.

    Raises:
        InputError: naming every difference; with `resume` "never", for any earlier start.
    """
    identity = json.loads(json.dumps(identity))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(identity, indent=2) + "\n")
        return
    if resume == "never":
        raise InputError(
            f"run.resume=never but {file.parent} holds results of an earlier start; choose another "
            "run.name, delete the folder, or set run.resume=auto"
        )
    differing = differences(_read(file), identity)
    if differing:
        raise InputError(
            f"{file.parent} holds results of another configuration or other data:\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nRestore these values to resume, or choose another run.name, or delete the folder"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it contains {json.dumps(found):.40}")
    except (ValueError, OSError) as error:
        raise InputError(
            f"{file} cannot be read ({error}): the configuration of the results in {file.parent} is unknown. "
            "Fix: choose another run.name, or delete the folder"
        ) from error
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per key path whose value has changed."""
    old, new = _leaves(before), _leaves(now)
    return [
        f"{key}: was {_show(old, key)}, is {_show(new, key)}"
        for key in dict.fromkeys([*old, *new])
        if (key in old) != (key in new) or old.get(key) != new.get(key)
    ]


def without_operational_keys(tree: Any) -> Any:
    """The tree without the keys that do not affect results."""
    if isinstance(tree, list):
        return [without_operational_keys(item) for item in tree]
    if isinstance(tree, dict):
        return {k: without_operational_keys(v) for k, v in tree.items() if k not in OPERATIONAL_KEYS}
    return tree


def _leaves(tree: Any, at: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {at: tree}
    return {
        path: leaf
        for key, value in items
        for path, leaf in _leaves(value, f"{at}.{key}" if at else key).items()
    }


def _show(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else MISSING
