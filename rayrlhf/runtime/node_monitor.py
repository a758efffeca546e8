"""Node monitor: watches a run's nodes from the driver and keeps `placement.json` up to date."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from rayrlhf.observe.console import Console
from rayrlhf.placement.reaper import worker_locations
from rayrlhf.placement.slots import PlacementError, Slots, refresh_slots
from rayrlhf.storage.atomic import write_atomically

JOIN_SECONDS = 60.0
LOOK_SECONDS = 1.0


@contextmanager
def nodes_watched(
    slots: Slots, console: Console, run_path: Path, *, timeout_seconds: float, give_up: Callable[[], None]
) -> Iterator[None]:
    """While the body runs, keep `placement.json` up to date. When a node of this run dies, its slots move to
    a spare node, with a line on the console.

    Raises:
        PlacementError: when no node takes the slots before the deadline; `give_up` ends the body first.
    """
    record = _PlacementRecord(slots, run_path / "placement.json")
    record.write()
    failure: list[PlacementError] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_SECONDS):
            record.write()
            lost = record.lost_nodes()
            if not lost:
                continue
            console.say(f"warning: node {', '.join(lost)} died; waiting for a spare")
            try:
                record.slots = refresh_slots(record.slots, timeout_seconds=timeout_seconds)
            except PlacementError as error:
                failure.append(error)
                give_up()
                return
            console.placement(record.slots)

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
        thread.join(JOIN_SECONDS)
        record.write()


class _PlacementRecord:
    """Writes `placement.json`: the slots, the planned roles, and the actual worker locations."""

    def __init__(self, slots: Slots, path: Path) -> None:
        self.slots = slots
        self.path = path
        self.written = ""

    def lost_nodes(self) -> list[str]:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sorted(node[:6] for node in {slot.node for slot in self.slots.table} - alive)

    def write(self) -> None:
        text = json.dumps(self._contents(), indent=2) + "\n"
        if text != self.written:
            write_atomically(self.path, text)
            self.written = text

    def _contents(self) -> dict[str, Any]:
        slots = self.slots
        table = [asdict(slot) | {"slot": index} for index, slot in enumerate(slots.table)]
        roles = {plan.role: plan.units for plan in slots.spec.roles}
        locations = [location._asdict() for location in worker_locations(slots.run_id)]
        return {"preset": slots.spec.preset, "slots": table, "roles": roles, "workers": locations}
