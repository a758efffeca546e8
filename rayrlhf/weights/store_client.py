"""Trainer-side client of the weight store; restores the store's state after its process died."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from rayrlhf.weights.store import Publication, StoreNotRestored, StoreState

POLL_SECONDS = 1.0
RETRY_SECONDS = 0.2


class StoreClient:
    """Client of rank 0. It keeps a copy of the published state and restores a restarted store from it.

    Engines wait for that, as they wait for announced weights.
    """

    def __init__(
        self, weight_store: Any, timeout_seconds: float, on_wanted: Callable[[], None] = lambda: None
    ) -> None:
        """`on_wanted`: called in a thread when an engine waits for what has been announced."""
        self.on_wanted = on_wanted
        self.weight_store = weight_store
        self.timeout_seconds = timeout_seconds
        self.state: StoreState | None = None  # None: these workers have published nothing yet
        self.num_restored = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="weight-store").start()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the store; retry while it restarts.

        Raises:
            GetTimeoutError: if the store does not answer within the deadline.
            ActorDiedError: if the store is dead for good.
        """
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            left = max(0.1, deadline - time.monotonic())
            try:
                return ray.get(getattr(self.weight_store, method).remote(*arguments), timeout=left)
            except StoreNotRestored:
                self._restore(left)
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)

    def announce(self, version: int) -> int:
        number: int = self.call("announce", version)
        with self._lock:
            self.state = StoreState(*self.call("current"))
        return number

    def publish(self, publication: Publication) -> None:
        self.call("publish", publication)
        self._update_copy(publication=publication)

    def set_engines_own_memory(self, engines_own_memory: bool) -> None:
        self.call("set_engines_own_memory", engines_own_memory)
        self._update_copy(engines_own_memory=engines_own_memory)

    def drain_restored(self) -> int:
        """Number of times the store was restored since the last call."""
        count, self.num_restored = self.num_restored, 0
        return count

    def close(self) -> None:
        self._stop.set()

    def _update_copy(self, **changes: Any) -> None:
        with self._lock:
            previous = self.state or StoreState(*self.call("current"))
            self.state = previous._replace(**changes)

    def _restore(self, seconds: float) -> None:
        ray.get(self.weight_store.restore.remote(self.state), timeout=seconds)
        self.num_restored += 1

    def _watch(self) -> None:
        """Restores the store while no trainer calls it, and publishes: engines may be waiting for it."""
        while not self._stop.wait(POLL_SECONDS):
            try:
                if self.call("take_wanted"):
                    self.on_wanted()
            except GetTimeoutError:
                continue  # slow, or restarting
            except RayActorError:
                return  # dead for good, with its run
