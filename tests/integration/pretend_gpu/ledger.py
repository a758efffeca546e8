"""What each process holds of each GPU's memory; the rules are checked at every event."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Ledger:
    """A file that all processes of this machine share, with a lock; what dead ones held is given back.

    1. What lives on a GPU never exceeds its capacity.
    2. While an engine measures the free memory, nobody else takes or gives any.
    """

    def __init__(self, folder: str | Path, capacity: int) -> None:
        self.folder = Path(folder)
        self.capacity = capacity

    def take(self, gpu: str, who: str, what: str, num_bytes: int) -> None:
        """What this process holds already it takes no second time."""
        with self._open(gpu) as (held, measuring):
            if (who, what) in ((each["who"], each["what"]) for each in held if each["pid"] == os.getpid()):
                return
            self._check_measuring(gpu, measuring, f"{who} took {what}")
            held.append({"pid": os.getpid(), "who": who, "what": what, "bytes": num_bytes})
            self._note(gpu, who, f"took {what}", held)
            self._check_sum(gpu, held)

    def give(self, gpu: str, who: str, what: str) -> int:
        """Give it back; returns its bytes, 0 if this process does not hold it."""
        with self._open(gpu) as (held, measuring):
            mine = [e for e in held if (e["pid"], e["who"], e["what"]) == (os.getpid(), who, what)]
            if mine:
                self._check_measuring(gpu, measuring, f"{who} gave {what} back")
            for each in mine:
                held.remove(each)
                self._note(gpu, who, f"gave {what}", held)
            return sum(each["bytes"] for each in mine)

    @contextmanager
    def measured(self, gpu: str, who: str, *, wanted: int) -> Iterator[None]:
        """Measure the free memory from here to the end of the context; `wanted` must be free at its start."""
        with self._open(gpu) as (held, measuring):
            free = self.capacity - _sum(held)
            if free < wanted:
                self._problem(
                    gpu, f"{who} starts and wants {wanted >> 30} GiB; free are {free >> 30}: {_text(held)}"
                )
            measuring.append({"pid": os.getpid(), "who": who})
            self._note(gpu, who, "measures", held)
        yield
        with self._open(gpu) as (held, measuring):
            measuring[:] = [each for each in measuring if each["pid"] != os.getpid()]
            self._note(gpu, who, "has measured", held)

    def note(self, gpu: str, who: str, what: str) -> None:
        with self._open(gpu) as (held, _):
            self._note(gpu, who, what, held)

    def problem(self, gpu: str, problem: str) -> None:
        with self._open(gpu):
            self._problem(gpu, problem)

    def arrive(self, who: str, gpu: str) -> None:
        """Somebody is where others wait for it; once per GPU."""
        with self._open(gpu) as (held, _):
            file = self._arrivals(who) / gpu
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                self._note(gpu, who, "arrived", held)

    def arrived(self, who: str, gpu: str = "*") -> int:
        """On how many GPUs, or whether on this one."""
        return len(list(self._arrivals(who).glob(gpu)))

    def _arrivals(self, who: str) -> Path:
        return self.folder / "arrived" / who

    def events(self) -> list[dict[str, Any]]:
        return _lines(self.folder / "events.jsonl")

    def problems(self) -> list[str]:
        return [each["problem"] for each in _lines(self.folder / "problems.jsonl")]

    @contextmanager
    def _open(self, gpu: str) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """(held, measuring) of a GPU, without those of dead processes; written back afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.folder / f"{gpu}.json"
            held, measuring = json.loads(file.read_text()) if file.exists() else ([], [])
            held = [each for each in held if _is_alive(each["pid"])]
            measuring = [each for each in measuring if _is_alive(each["pid"])]
            yield held, measuring
            file.write_text(json.dumps([held, measuring]))

    def _check_measuring(self, gpu: str, measuring: list[dict[str, Any]], what: str) -> None:
        for each in measuring:
            if each["pid"] != os.getpid():
                self._problem(gpu, f"{what} while {each['who']} measured the free memory")

    def _check_sum(self, gpu: str, held: list[dict[str, Any]]) -> None:
        if _sum(held) > self.capacity:
            self._problem(gpu, f"{_sum(held) >> 30} GiB of {self.capacity >> 30} are taken: {_text(held)}")

    def _problem(self, gpu: str, problem: str) -> None:
        self._append("problems.jsonl", {"problem": f"{gpu}: {problem}"})

    def _note(self, gpu: str, who: str, what: str, held: list[dict[str, Any]]) -> None:
        event = {"time": time.time(), "gpu": gpu, "who": who, "what": what, "gib": _sum(held) >> 30}
        self._append("events.jsonl", event)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")


def _sum(held: list[dict[str, Any]]) -> int:
    return sum(each["bytes"] for each in held)


def _text(held: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['who']}'s {each['what']} {each['bytes'] >> 30}" for each in held)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
