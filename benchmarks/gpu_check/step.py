"""What a step of gpu-check gets: the device, options, and a place for what it measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB, MIB = 2**30, 2**20
Value = float | int | bool | str


class Skip(Exception):
    """Raised by a step that cannot run here; its text says why."""


@dataclass(frozen=True)
class Context:
    device_type: str  # cuda or cpu
    answer: Path  # measurements, one JSON line each
    traces: Path  # folder of profiler traces
    cumem: Path | None = None  # folder with vLLM's csrc/cumem_allocator.cpp

    @cached_property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device_type == "cuda"

    def record(self, name: str, value: Value, unit: str = "") -> None:
        """Written at once: what was measured before a failure or the deadline is kept."""
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        with self.answer.open("a") as file:
            file.write(json.dumps({"name": name, "value": value, "unit": unit}) + "\n")
