"""Collectives over the process group that Ray Train set up.

Loops pass a `Ranks` object to the code that communicates; tests pass simulated ranks instead.

These collectives are of a few numbers and of Python objects, and go through host memory (gloo). A rank waits
in them for others whose rollouts still run: with NCCL it would wait in a kernel, on a GPU on which an engine
may still generate for the others.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.algorithms.metrics import Max, Metrics

HOST = torch.device("cpu")


def device() -> torch.device:
    """The device of this rank's tensors: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over ranks, as a new tensor on the caller's device."""
    total = values.detach().to(HOST, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.to(values.device)


def sum_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Sum dictionaries of numbers over ranks in one all-reduce; every rank must pass the same keys."""
    keys = sorted(sums)
    total = sum_over_ranks(torch.tensor([sums[key] for key in keys], dtype=torch.float64))
    return dict(zip(keys, total.tolist(), strict=True))


def max_over_ranks(value: float) -> float:
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the ranks' lists in rank order, on every rank."""
    if not dist.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def exchange(outgoing: list[list[Any]]) -> list[Any]:
    """Send `outgoing[r]` to rank r (all-to-all); returns the items received, in order of sender rank."""
    if world_size() == 1:
        return outgoing[0]
    packets = [_to_bytes(items) for items in outgoing]
    sizes = [torch.empty(world_size(), dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([packet.numel() for packet in packets]))
    incoming = [torch.empty(int(sizes[sender][rank()]), dtype=torch.uint8) for sender in range(world_size())]
    others = [other for other in range(world_size()) if other != rank()]
    transfers = [dist.P2POp(dist.isend, packets[other], other) for other in others]
    transfers += [dist.P2POp(dist.irecv, incoming[other], other) for other in others]
    for transfer in dist.batch_isend_irecv(transfers):
        transfer.wait()
    incoming[rank()] = packets[rank()]
    return [item for packet in incoming for item in pickle.loads(packet.numpy().tobytes())]


def _to_bytes(items: list[Any]) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(metrics: Metrics) -> Metrics:
    """Reduce metrics over ranks; every rank must pass the same keys."""
    in_order = [(key, metrics[key]) for key in sorted(metrics)]
    addends = [number for _, metric in in_order if not isinstance(metric, Max) for number in metric.addends()]
    totals = iter(sum_over_ranks(torch.tensor(addends, dtype=torch.float64)).tolist())
    added = Metrics()
    for key, metric in in_order:
        if isinstance(metric, Max):
            added[key] = Max(max_over_ranks(metric.result()))
        else:
            added[key] = type(metric).of([next(totals) for _ in metric.addends()])
    return added


class Ranks:
    """The ranks of this process's trainer."""

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world_size(self) -> int:
        return world_size()

    @property
    def device(self) -> torch.device:
        return device()

    def sum_tensor(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    def sum_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        return sum_metrics(numbers)

    def max(self, value: float) -> float:
        return max_over_ranks(value)

    def min(self, value: float) -> float:
        return -max_over_ranks(-value)

    def barrier(self) -> None:
        """Return once every rank has called it."""
        max_over_ranks(0.0)

    def gather(self, items: list[Any]) -> list[Any]:
        return gather_lists(items)

    def exchange(self, outgoing: list[list[Any]]) -> list[Any]:
        return exchange(outgoing)
