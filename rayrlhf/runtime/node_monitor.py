"""Watches the nodes of a run from the driver, and keeps `placement.json` true."""

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
from rayrlhf.runtime.fingerprint import write_atomically

JOIN_SECONDS = 60.0
LOOK_SECONDS = 1.0


@contextmanager
def nodes_watched(
    slots: Slots, console: Console, run_path: Path, *, timeout_seconds: float, give_up: Callable[[], None]
) -> Iterator[None]:
    """While the body runs, keep `placement.json` true: when a node of this run dies, its slots move to a
    spare one, which is told.

    Ends the body by `give_up` and raises `PlacementError` when no node takes them before the deadline.
    """
    book = _PlacementBook(slots, run_path / "placement.json")
    book.write()
    failure: list[PlacementError] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_SECONDS):
            book.write()
            lost = book.lost_nodes()
            if not lost:
                continue
            console.say(f"warning: node {', '.join(lost)} died; waiting for a spare")
            try:
                book.slots = refresh_slots(book.slots, timeout_seconds=timeout_seconds)
            except PlacementError as error:
                failure.append(error)
                give_up()
                return
            console.placement(book.slots)

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
        book.write()


class _PlacementBook:
    """The file that says which slots there are, what the plan puts on them, and who really sits where."""

    def __init__(self, slots: Slots, path: Path) -> None:
        self.slots = slots
        self.path = path
        self.written = ""

    def lost_nodes(self) -> list[str]:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sorted(node[:6] for node in {slot.node for slot in self.slots.table} - alive)

    def write(self) -> None:
        text = json.dumps(self._told(), indent=2) + "\n"
        if text != self.written:
            write_atomically(self.path, text)
            self.written = text

    def _told(self) -> dict[str, Any]:
        slots = self.slots
        table = [asdict(slot) | {"slot": index} for index, slot in enumerate(slots.table)]
        roles = {plan.role: plan.units for plan in slots.spec.roles}
        seats = [seat._asdict() for seat in worker_locations(slots.run_id)]
        return {"preset": slots.spec.preset, "slots": table, "roles": roles, "seats": seats}
