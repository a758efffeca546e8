"""Reaper: cleans up a run after its driver died, even by kill -9. Also the registry of worker locations.

Serve apps are always detached. A detached reaper actor watches a lease: an actor that dies permanently with
the driver, and that Ray restarts if only its own process dies. When the lease is gone, the reaper deletes
this run's apps and its placement group, and then itself. It never touches Serve as a whole or other runs'
apps. The reaper's process has no state to lose: worker locations are in the cluster's key-value store.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any, NamedTuple

import ray
from ray._raylet import PlacementGroupID  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, remove_placement_group

NAMESPACE = "rayrlhf"  # Ray namespace of the named actors of all runs
WATCH_SECONDS = 1.0
PING_SECONDS = 20.0
DELETE_SECONDS = 60.0
LOCATIONS = b"rayrlhf-worker-locations"  # namespace in Ray's internal key-value store
HEAD_NODE = "node:__internal_head__"  # a resource that only the head node has


class WorkerLocation(NamedTuple):
    """Node, GPU and process of one unit of a role."""

    role: str
    unit: int
    node: str
    gpu: str | None
    pid: int


@ray.remote(num_cpus=0)
class Reaper:
    def __init__(self, lease: str, run_id: str, group_id: str) -> None:
        # Names instead of handles: a restarted reaper cannot recover handles owned by a dead driver.
        self.lease_name = lease
        self.lease: Any = None
        self.run_id = run_id
        self.group = PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
        self.released = False
        threading.Thread(target=self._watch, daemon=True).start()

    def ready(self) -> bool:
        return True

    def release(self) -> None:
        """Called by the driver after its own cleanup."""
        self.released = True

    def _watch(self) -> None:
        while not self.released and self._driver_lives():
            time.sleep(WATCH_SECONDS)
        if not self.released:
            delete_apps(self.run_id)
            remove_placement_group(self.group)
            unregister_workers(self.run_id)
        ray.kill(ray.get_runtime_context().current_actor)

    def _driver_lives(self) -> bool:
        try:
            if self.lease is None:
                self.lease = ray.get_actor(self.lease_name, namespace=NAMESPACE)
            ray.get(self.lease.ping.remote(), timeout=PING_SECONDS)
        except (GetTimeoutError, ActorUnavailableError):
            return True  # slow is not dead, and Ray restarts the lease's process
        except (RayActorError, ValueError):  # ValueError: the name is no longer registered
            return False
        return True


def delete_apps(run_id: str) -> None:
    """Delete this run's Serve apps, `<run_id>-<role>`, and wait until their replicas are gone."""
    # Here, as it takes more than a second of CPU: most processes of a run only register themselves.
    from ray import serve

    from rayrlhf.placement.serve_status import app_statuses

    def mine() -> list[str]:
        return [name for name in app_statuses() if name.startswith(f"{run_id}-")]

    for name in mine():
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + DELETE_SECONDS
    while mine() and time.monotonic() < deadline:
        time.sleep(0.1)


def register_worker(run_id: str, role: str, unit: int) -> None:
    """Register this process' node, GPU and pid. Called at every start: a restart may move the process."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    location = WorkerLocation(role, unit, context.get_node_id(), gpus[0] if gpus else None, os.getpid())
    internal_kv._internal_kv_put(_key(run_id, location), json.dumps(location), namespace=LOCATIONS)


def worker_locations(run_id: str) -> list[WorkerLocation]:
    """All registered locations of the run, sorted by role and unit."""
    values = (internal_kv._internal_kv_get(key, namespace=LOCATIONS) for key in _keys(run_id))
    return sorted(WorkerLocation(*json.loads(value)) for value in values if value is not None)


def unregister_workers(run_id: str) -> None:
    for key in _keys(run_id):
        internal_kv._internal_kv_del(key, namespace=LOCATIONS)


def _key(run_id: str, location: WorkerLocation) -> str:
    return f"{run_id}/{location.role}/{location.unit}"


def _keys(run_id: str) -> list[bytes]:
    return internal_kv._internal_kv_list(f"{run_id}/", namespace=LOCATIONS)


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
