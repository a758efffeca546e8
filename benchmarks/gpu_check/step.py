"""What a step of gpu-check gets: the device, options, and a place for what it measures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

GIB, MIB = 2**30, 2**20
Value = float | int | bool | str


class Skip(Exception):
    """Raised by a step that cannot run here; its text says why."""


@dataclass(frozen=True)
class Context:
    device: torch.device
    answer: Path  # measurements, one JSON line each
    traces: Path  # folder of profiler traces
    cumem: Path | None = None  # folder with vLLM's csrc/cumem_allocator.cpp

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def record(self, name: str, value: Value, unit: str = "") -> None:
        """Written at once: what was measured before a failure or the deadline is kept."""
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        with self.answer.open("a") as file:
            file.write(json.dumps({"name": name, "value": value, "unit": unit}) + "\n")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """The shortest of `repeats` runs after one to warm up."""
    action()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def reserved_bytes(device: torch.device) -> int:
    """What torch holds of the GPU, with cached blocks."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
