"""Resolves a pinned hub id to a local folder on this node, in any process of a run.

Choice of the cache. A node uses its own cache if its environment names one (HF_HOME or HF_HUB_CACHE as its
administrator set them: a local disk, a shared folder). Otherwise the driver's path applies, if the driver's
environment names one; a shared folder is then filled once for all nodes, any other is filled on each node. If
neither names one, it is huggingface_hub's default, under the home folder. Missing files are fetched from the
hub by one process of the node while others wait for it. A node that cannot reach the hub falls back to the
driver's cache if it is visible there (a shared folder).

The token comes from the driver, on demand and over Ray's own connections: see `Access`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.hub.access import Access, access_from_env
from rayrlhf.hub.hub_errors import HubError
from rayrlhf.hub.ids import HubId, cache_folder, names_a_cache, pinned_id
from rayrlhf.hub.snapshots import (
    STALLED_SECONDS,
    bytes_fetched,
    complete_folder,
    fetch,
)

ACTOR_PREFIX = "hub-access-"
ASK_SECONDS = 30.0
LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class HubSettings:
    """Hub access and cache of the driver, for other processes of the run."""

    access: Access
    cache: str  # cache folder of the driver
    cache_is_named: bool  # set by the driver's environment, not the default


class HubSettingsActor:
    """Actor that holds the driver's `HubSettings`. It dies with the driver, and the secret with it."""

    def __init__(self) -> None:
        self.settings: HubSettings | None = None
        self.ids: frozenset[str] = frozenset()

    def set(self, settings: HubSettings, ids: frozenset[str]) -> None:
        """Not constructor arguments: Ray stores those in its cluster-wide tables."""
        self.settings, self.ids = settings, ids

    def settings_for(self, hub_id: str) -> HubSettings | None:
        return self.settings if hub_id in self.ids else None


def local_folder(path: str, *, weights: bool = True, say: Callable[[str], None] = lambda _: None) -> str:
    """The folder of a pinned id on this node, fetched if needed; any other text is already a folder.

    Without `weights` only config, tokenizer and templates are guaranteed. Raises `HubError`.
    """
    hub_id = pinned_id(path)
    if hub_id is None:
        return path
    own = cache_folder(os.environ)
    if found := complete_folder(own, hub_id, weights=weights):
        return found
    settings = _settings_of_run(hub_id)
    cache = own
    if settings is not None and settings.cache_is_named and not names_a_cache(os.environ):
        cache = Path(settings.cache)
    access = access_from_env() if settings is None else _merged_access(settings.access)
    try:
        with _locked(cache, hub_id):
            if found := complete_folder(cache, hub_id, weights=weights):
                return found
            return fetch(cache, hub_id, access, weights=weights, say=say)
    except HubError:
        seen = None if settings is None else complete_folder(Path(settings.cache), hub_id, weights=weights)
        if seen is None:
            raise
        return seen


def _merged_access(access: Access) -> Access:
    """The driver's access, completed by this node's environment."""
    own = access_from_env()
    return Access(access.token or own.token, access.endpoint or own.endpoint, access.offline or own.offline)


def _settings_of_run(hub_id: HubId) -> HubSettings | None:
    """From the settings actor of a run that uses this id; None if there is none. Actors are found by name:
    processes that tokenise, serve or train are started in many ways, and none needs a further argument.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util import list_named_actors

    if not ray.is_initialized():
        return None
    named: list[Any] = list_named_actors(all_namespaces=True)
    for found in named:
        if not found["name"].startswith(ACTOR_PREFIX):
            continue
        try:
            actor: Any = ray.get_actor(found["name"], namespace=found["namespace"])
            settings: Any = ray.get(actor.settings_for.remote(str(hub_id)), timeout=ASK_SECONDS)
        except (ValueError, RayError):  # the run has just ended
            continue
        if settings is not None:
            return settings
    return None


@contextlib.contextmanager
def _locked(cache: Path, hub_id: HubId) -> Iterator[None]:
    """Lock so that one process per node fetches; others wait while it makes progress. Raises `HubError`."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    file = cache / ".locks" / hub_id.cache_name / f"snapshot-{hub_id.revision}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(
            f"{hub_id}: the cache {cache} cannot be written ({error.strerror}). Fix: set HF_HOME on this "
            "node to a writable folder, or to one that already has the files"
        ) from error
    moved, last = time.monotonic(), -1
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(file, timeout=LOCK_SECONDS))
                break
            except Timeout:
                there = bytes_fetched(cache, hub_id)
                if there != last:
                    moved, last = time.monotonic(), there
                if time.monotonic() - moved > STALLED_SECONDS + LOCK_SECONDS:
                    raise HubError(
                        f"{hub_id}: another process holds {file} and has fetched nothing for "
                        f"{STALLED_SECONDS:g} s. Fix: end that process"
                    ) from None
        yield
