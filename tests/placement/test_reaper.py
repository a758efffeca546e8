"""The reaper distinguishes the death of a run's driver from the deaths of helper processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table

from rayrlhf.observe.board import Board
from rayrlhf.placement import reaper as module
from rayrlhf.runtime.run import named_actor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SECONDS = 120


def kill_process(actor: Any) -> None:
    pid: Any = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=SECONDS)
    os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(actor: Any, method: str) -> bool:
    try:
        return bool(ray.get(getattr(actor, method).remote(), timeout=SECONDS))
    except RayActorError:
        return False


def test_28_only_the_death_of_the_driver_triggers_the_cleanup() -> None:
    """The board is the lease. The death of its process must not delete a live run's placement group."""
    board = named_actor(Board, "rayrlhf-lease-board")
    group = placement_group([{"CPU": 0.1}])
    ray.get(group.ready(), timeout=SECONDS)

    def state() -> str:
        return placement_group_table(group)["state"]

    reaper = module.start_reaper("rayrlhf-lease", "rayrlhf-lease-board", group)
    kill_process(board)
    wait_until(lambda: answers(board, "ping"))
    time.sleep(5 * module.WATCH_SECONDS)
    assert state() == "CREATED" and answers(reaper, "ready")

    kill_process(reaper)
    wait_until(lambda: answers(reaper, "ready"))
    time.sleep(2 * module.WATCH_SECONDS)
    assert state() == "CREATED"

    ray.kill(board)  # permanently, as Ray does with the actors of a dead driver
    wait_until(lambda: state() == "REMOVED")
    wait_until(lambda: not answers(reaper, "ready"))


def test_28_worker_locations_do_not_depend_on_a_process() -> None:
    locations = [module.WorkerLocation("rollout", unit, "node", None, 100 + unit) for unit in (1, 0)]
    for location in locations:
        key = module._key("rayrlhf-locations", location)
        module.internal_kv._internal_kv_put(key, module.json.dumps(location), namespace=module.LOCATIONS)
    assert (
        module.worker_locations("rayrlhf-locations") == locations[::-1]
        and module.worker_locations("rayrlhf-location") == []
    )
    module.unregister_workers("rayrlhf-locations")
    assert module.worker_locations("rayrlhf-locations") == []
