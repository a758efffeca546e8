"""What runs on the driver beside the actor's trainer: the critic's own, and a look at the nodes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from rayrlhf.loops.driver import RunFailed, fit
from rayrlhf.observe.console import Console
from rayrlhf.placement.apply import PlacementError, Slots, refresh_slots
from rayrlhf.placement.lease import seats_of
from rayrlhf.placement.trainer import SlotTorchTrainer

FAREWELL_SECONDS = 60.0  # for a trainer whose loop has been told to end
LOOK_SECONDS = 1.0


@contextmanager
def trained_beside(trainer: SlotTorchTrainer, *, role: str, give_up: Callable[[], None]) -> Iterator[None]:
    """While the body trains, so does `trainer`. Whichever fails for good ends the other: `give_up` must end
    the body. Raises `RunFailed` with the reason of the one that failed first.
    """
    failure: list[Exception] = []
    leaving = threading.Event()

    def run() -> None:
        try:
            fit(trainer)
        except Exception as error:
            if not leaving.is_set():  # else we have ended it
                failure.append(error)
                give_up()

    thread = threading.Thread(target=run, daemon=True, name=f"{role}-trainer")
    thread.start()
    try:
        yield
        thread.join(FAREWELL_SECONDS)
    except Exception:
        if failure:
            raise RunFailed(f"the {role}'s {failure[0]}") from failure[0]
        raise
    finally:
        leaving.set()
        if thread.is_alive():
            trainer.abort()
            thread.join(FAREWELL_SECONDS)


@contextmanager
def nodes_watched(
    slots: Slots, console: Console, run_path: Path, *, timeout_seconds: float, give_up: Callable[[], None]
) -> Iterator[None]:
    """While the body runs, keep `placement.json` true: when a node of this run dies, its slots move to a
    spare one, which is told.

    Ends the body by `give_up` and raises `PlacementError` when no node takes them before the deadline.
    """
    _write_placement(slots, run_path)
    failure: list[PlacementError] = []
    stop = threading.Event()

    current = slots

    def watch() -> None:
        nonlocal current
        while not stop.wait(LOOK_SECONDS):
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            lost = {slot.node for slot in current.table} - alive
            if not lost:
                continue
            console.say(
                f"warning: node {', '.join(sorted(node[:6] for node in lost))} died; waiting for a spare"
            )
            try:
                current = refresh_slots(current, timeout_seconds=timeout_seconds)
            except PlacementError as error:
                failure.append(error)
                give_up()
                return
            console.placement(current)

    thread = threading.Thread(target=watch, daemon=True, name="nodes")
    thread.start()
    try:
        yield
    except Exception:
        if failure:
            raise failure[0] from None
        raise
    finally:
        stop.set()
        thread.join(FAREWELL_SECONDS)
        _write_placement(current, run_path)


def _write_placement(slots: Slots, run_path: Path) -> None:
    """Slots, what the plan puts on them, and who really sits where."""
    table = [
        {"slot": index, "bundle": slot.bundle, "node": slot.node, "gpu": slot.gpu, "gpu_uuid": slot.gpu_uuid}
        for index, slot in enumerate(slots.table)
    ]
    roles = {plan.role: [list(unit) for unit in plan.units] for plan in slots.spec.roles}
    seats = [seat._asdict() for seat in seats_of(slots.run_id)]
    told = {"preset": slots.spec.preset, "slots": table, "roles": roles, "seats": seats}
    (run_path / "placement.json").write_text(json.dumps(told, indent=2) + "\n")
