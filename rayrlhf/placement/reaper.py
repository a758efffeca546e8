"""Nothing of a run outlives its driver, not even after kill -9.

Serve apps are detached by nature. A detached reaper watches a lease, an actor that dies for good with the
driver and that Ray starts again when its process alone dies; when it is gone the reaper deletes this run's
apps and its placement group, and then itself. Serve as a whole and other runs' apps are never touched. The
reaper holds nothing that its own process would take along: who sits where stands in the cluster's store.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any, NamedTuple

import ray
from ray import serve
from ray._raylet import PlacementGroupID  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rayrlhf.placement.serve_status import app_statuses

NAMESPACE = "rayrlhf"  # of the named actors of all runs
WATCH_SECONDS = 1.0
PING_SECONDS = 20.0
DELETE_SECONDS = 60.0
SEATS = b"rayrlhf-seats"  # namespace of the cluster's store of keys and values
HEAD_NODE = "node:__internal_head__"  # a resource that Ray gives to the head alone


class Seat(NamedTuple):
    """Where a unit of a role really is."""

    role: str
    unit: int
    node: str
    gpu: str | None
    pid: int


@ray.remote(num_cpus=0)
class Reaper:
    def __init__(self, lease: str, run_id: str, group_id: str) -> None:
        # Names and not handles: what belongs to the driver cannot be had again when both have died.
        self.lease_name = lease
        self.lease: Any = None
        self.run_id = run_id
        self.group = PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
        self.released = False
        threading.Thread(target=self._watch, daemon=True).start()

    def ready(self) -> bool:
        return True

    def release(self) -> None:
        """The driver has tidied up by itself."""
        self.released = True

    def _watch(self) -> None:
        while not self.released and self._driver_lives():
            time.sleep(WATCH_SECONDS)
        if not self.released:
            delete_apps(self.run_id)
            remove_placement_group(self.group)
            forget_seats(self.run_id)
        ray.kill(ray.get_runtime_context().current_actor)

    def _driver_lives(self) -> bool:
        try:
            if self.lease is None:
                self.lease = ray.get_actor(self.lease_name, namespace=NAMESPACE)
            ray.get(self.lease.ping.remote(), timeout=PING_SECONDS)
        except (GetTimeoutError, ActorUnavailableError):
            return True  # slow is not dead; and a process of its own that died comes back
        except (RayActorError, ValueError):  # ValueError: it is not even known any longer
            return False
        return True


def delete_apps(run_id: str) -> None:
    """Delete this run's Serve apps, `<run_id>-<role>`, and wait until their replicas are gone."""

    def mine() -> list[str]:
        return [name for name in app_statuses() if name.startswith(f"{run_id}-")]

    for name in mine():
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + DELETE_SECONDS
    while mine() and time.monotonic() < deadline:
        time.sleep(0.1)


def sit_down(run_id: str, role: str, unit: int) -> None:
    """Write where this process is; after a restart it may be elsewhere."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    seat = Seat(role, unit, context.get_node_id(), gpus[0] if gpus else None, os.getpid())
    internal_kv._internal_kv_put(_key(run_id, seat), json.dumps(seat), namespace=SEATS)


def seats_of(run_id: str) -> list[Seat]:
    """Who sits where, by role and unit."""
    found = (internal_kv._internal_kv_get(key, namespace=SEATS) for key in _keys(run_id))
    return sorted(Seat(*json.loads(seat)) for seat in found if seat is not None)


def forget_seats(run_id: str) -> None:
    for key in _keys(run_id):
        internal_kv._internal_kv_del(key, namespace=SEATS)


def _key(run_id: str, seat: Seat) -> str:
    return f"{run_id}/{seat.role}/{seat.unit}"


def _keys(run_id: str) -> list[bytes]:
    return internal_kv._internal_kv_list(f"{run_id}/", namespace=SEATS)


def _reaper_name(run_id: str) -> str:
    return f"{run_id}-reaper"


def start_reaper(run_id: str, lease: str, group: PlacementGroup) -> Any:
    """Watch the actor named `lease`, with a `ping` method, which Ray restarts until its driver dies."""
    reaper = Reaper.options(
        name=_reaper_name(run_id),
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        resources={HEAD_NODE: 0.001},  # it must outlive the driver's node
    ).remote(lease, run_id, group.id.hex())
    ray.get(reaper.ready.remote())
    return reaper
