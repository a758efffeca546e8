"""From a pinned id to a folder of this node, in any process of a run.

Which cache it is. A node has one of its own where its environment names one (HF_HOME or HF_HUB_CACHE as its
administrator set them: a local disk, a shared folder). Where it names none, the driver's holds on it, if the
driver's environment names one; a shared folder then has been filled once for all nodes, and any other is
filled on each node. Where neither names one it is huggingface_hub's default, under the home folder. A cache
that lacks something is filled from the hub, by one process of the node while others wait for it. A node that
cannot reach the hub still takes what it sees of the driver's cache: a shared folder.

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
from rayrlhf.hub.errors import HubError
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
    """What the driver lets other processes have."""

    access: Access
    cache: str  # the driver's
    cache_is_named: bool  # by its environment


class HubSettingsActor:
    """The actor that lends. It dies with the driver, and the secret with it."""

    def __init__(self) -> None:
        self.lent: HubSettings | None = None
        self.ids: frozenset[str] = frozenset()

    def keep(self, lent: HubSettings, ids: frozenset[str]) -> None:
        """By a call, not by the constructor: Ray keeps constructors' arguments in its cluster-wide tables."""
        self.lent, self.ids = lent, ids

    def lend(self, hub_id: str) -> HubSettings | None:
        return self.lent if hub_id in self.ids else None


def local_folder(path: str, *, weights: bool = True, say: Callable[[str], None] = lambda _: None) -> str:
    """The folder of a pinned id on this node, fetched if need be; any other text is a folder already.

    Without `weights` only config, tokenizer and templates are sure to be in it. Raises `HubError`.
    """
    hub_id = pinned_id(path)
    if hub_id is None:
        return path
    own = cache_folder(os.environ)
    if found := complete_folder(own, hub_id, weights=weights):
        return found
    lent = _settings_of_run(hub_id)
    cache = own
    if lent is not None and lent.cache_is_named and not names_a_cache(os.environ):
        cache = Path(lent.cache)
    access = access_from_env() if lent is None else _merged_access(lent.access)
    try:
        with _locked(cache, hub_id):
            if found := complete_folder(cache, hub_id, weights=weights):
                return found
            return fetch(cache, hub_id, access, weights=weights, say=say)
    except HubError:
        seen = None if lent is None else complete_folder(Path(lent.cache), hub_id, weights=weights)
        if seen is None:
            raise
        return seen


def _merged_access(access: Access) -> Access:
    """The driver's, with what only this node's environment says."""
    own = access_from_env()
    return Access(access.token or own.token, access.endpoint or own.endpoint, access.offline or own.offline)


def _settings_of_run(hub_id: HubId) -> HubSettings | None:
    """From the keeper of a run that uses this id. They are found by their names: processes that tokenise,
    serve or train start in many ways, and none of them needs a further argument for this.
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
            keeper: Any = ray.get_actor(found["name"], namespace=found["namespace"])
            lent: Any = ray.get(keeper.lend.remote(str(hub_id)), timeout=ASK_SECONDS)
        except (ValueError, RayError):  # that run has just ended
            continue
        if lent is not None:
            return lent
    return None


@contextlib.contextmanager
def _locked(cache: Path, hub_id: HubId) -> Iterator[None]:
    """One process of a node fetches; others wait as long as it gets on. Raises `HubError`."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    file = cache / ".locks" / hub_id.cache_name / f"snapshot-{hub_id.revision}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(
            f"{hub_id}: the cache {cache} cannot be written ({error.strerror}). Fix: set HF_HOME on this "
            "node to a folder that can, or to one that has the files already"
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
