"""The trainers' end of the weight hub: it gives a hub whose process died its state back."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from rayrlhf.weights.store import HubIsBlank, HubState, Publication

LOOK_SECONDS = 1.0
RETRY_SECONDS = 0.2


class HubClient:
    """Of rank 0. What it has published it keeps alive, so that a hub that lost its memory has it again while
    nobody has noticed: engines wait for that, as for weights that are on their way.
    """

    def __init__(self, hub: Any, timeout_seconds: float) -> None:
        self.hub = hub
        self.timeout_seconds = timeout_seconds
        self.state: HubState | None = None  # None: nothing has come from these workers yet
        self.num_restored = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="weight-hub").start()

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises `GetTimeoutError` when there is no hub within the deadline, `ActorDiedError` when there will
        be none.
        """
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            left = max(0.1, deadline - time.monotonic())
            try:
                return ray.get(getattr(self.hub, method).remote(*arguments), timeout=left)
            except HubIsBlank:
                self._restore(left)
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)

    def announce(self, version: int) -> int:
        number: int = self.call("announce", version)
        self._keep(announced=(number, version))
        return number

    def publish(self, publication: Publication) -> None:
        self.call("publish", publication)
        self._keep(publication=publication)

    def set_turn(self, engines: bool) -> None:
        self.call("set_turn", engines)
        self._keep(engines_turn=engines)

    def drain_restored(self) -> int:
        """How often the hub has had to be given its state since the last call."""
        count, self.num_restored = self.num_restored, 0
        return count

    def close(self) -> None:
        self._stop.set()

    def _keep(self, **changes: Any) -> None:
        with self._lock:
            before = self.state or HubState(*self.call("current"))
            self.state = before._replace(**changes)

    def _restore(self, seconds: float) -> None:
        ray.get(self.hub.restore.remote(self.state), timeout=seconds)
        self.num_restored += 1

    def _watch(self) -> None:
        """Engines may be waiting while no trainer asks the hub for anything."""
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self.call("ping")
            except GetTimeoutError:
                continue  # slow, or coming back
            except RayActorError:
                return  # gone for good, with its run
