"""Optimizer states on their way to host memory and back: pageable against rayrlhf's pinned buffers."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.gpu_check.measure import synchronize
from benchmarks.gpu_check.step import GIB, MIB, Context
from rayrlhf.train.device_memory import to_device, to_host


def run(context: Context) -> None:
    """On a CPU the tensors are copied all the same, but nothing is pinned."""
    size, count = (128 * MIB, 32) if context.on_gpu else (MIB, 8)
    context.record("tensors", size * count / GIB, "GiB")
    for pinned in (True, False) if context.on_gpu else (False,):
        name = "pinned" if pinned else "pageable"
        tensors = [torch.randn(size // 4, device=context.device) for _ in range(count)]
        wanted = [tensor.sum(dtype=torch.float64).cpu() for tensor in tensors]
        buffers: list[Tensor] = []
        for turn in ("first", "second", "third"):
            synchronize(context.device)
            seconds = [time.perf_counter()]
            to_host(tensors, buffers, pinned=pinned)
            seconds.append(time.perf_counter())
            assert all(tensor.device.type == "cpu" for tensor in tensors)
            to_device(tensors, context.device)
            synchronize(context.device)
            seconds.append(time.perf_counter())
            for what, start, stop in (("to the host", *seconds[:2]), ("back", *seconds[1:])):
                context.record(f"{name}, {turn}: {what}", 1e-9 * size * count / (stop - start), "GB/s")
        got = [tensor.sum(dtype=torch.float64).cpu() for tensor in tensors]
        assert torch.allclose(torch.stack(got), torch.stack(wanted), rtol=1e-12, atol=1e-6), "values changed"
        assert all(buffer.is_pinned() == pinned for buffer in buffers) or not context.on_gpu
