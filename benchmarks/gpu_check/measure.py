"""Times, errors and bytes that several steps measure."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


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
