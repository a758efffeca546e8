"""The reaper tells the death of a run's driver from the deaths of light processes."""

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
from rayrlhf.placement import reaper as lease
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


def test_28_only_the_drivers_death_is_a_drivers_death() -> None:
    """The board is the lease. Before, its process' death had the reaper delete the living run's group."""
    board = named_actor(Board, "rayrlhf-lease-board")
    group = placement_group([{"CPU": 0.1}])
    ray.get(group.ready(), timeout=SECONDS)

    def state() -> str:
        return placement_group_table(group)["state"]

    reaper = lease.start_reaper("rayrlhf-lease", "rayrlhf-lease-board", group)
    kill_process(board)
    wait_until(lambda: answers(board, "ping"))
    time.sleep(5 * lease.WATCH_SECONDS)
    assert state() == "CREATED" and answers(reaper, "ready")

    kill_process(reaper)
    wait_until(lambda: answers(reaper, "ready"))
    time.sleep(2 * lease.WATCH_SECONDS)
    assert state() == "CREATED"

    ray.kill(board)  # for good, as Ray does with the actors of a driver that has died
    wait_until(lambda: state() == "REMOVED")
    wait_until(lambda: not answers(reaper, "ready"))


def test_28_who_sits_where_is_known_without_any_process() -> None:
    seats = [lease.Seat("rollout", unit, "node", None, 100 + unit) for unit in (1, 0)]
    for seat in seats:
        key = lease._key("rayrlhf-seats", seat)
        lease.internal_kv._internal_kv_put(key, lease.json.dumps(seat), namespace=lease.SEATS)
    assert lease.seats_of("rayrlhf-seats") == seats[::-1] and lease.seats_of("rayrlhf-seat") == []
    lease.forget_seats("rayrlhf-seats")
    assert lease.seats_of("rayrlhf-seats") == []
