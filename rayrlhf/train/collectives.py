"""Collectives over the process group that Ray Train set up.

Loops pass a `Ranks` object to the code that communicates; tests pass simulated ranks instead.

These collectives are of a few numbers and of Python objects, and go through host memory (gloo). A rank waits
in them for others whose rollouts still run: with NCCL it would wait in a kernel, on a GPU on which an engine
may still generate for the others.

gloo's own all-reduce and all-gather are rings, in which a message passes every rank once or twice: 1,022 hops
for 512 ranks. Here the ranks swap messages in pairs, with rank ^ 1, ^ 2, ^ 4, …: 9 rounds for 512 (recursive
doubling: Thakur et al. 2005, Int. J. High Perform. Comput. Appl. 19, section 4).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.algorithms.metrics import Max, Metrics

HOST = torch.device("cpu")
RING_BYTES = (
    2**20
)  # from here on the bytes cost more than the hops: a ring sends each twice, pairs log2 times
T = TypeVar("T")


def device() -> torch.device:
    """The device of this rank's tensors: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over ranks, as a new tensor on the caller's device; the same bits on every rank."""
    total = values.detach().to(HOST, copy=True)
    if total.nbytes < RING_BYTES:
        total = _reduced(total, torch.add)
    elif world_size() > 1:
        dist.all_reduce(total)
    return total.to(values.device)


def sum_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Sum dictionaries of numbers over ranks in one all-reduce; every rank must pass the same keys."""
    keys = sorted(sums)
    total = sum_over_ranks(torch.tensor([sums[key] for key in keys], dtype=torch.float64))
    return dict(zip(keys, total.tolist(), strict=True))


def max_over_ranks(value: float) -> float:
    [most] = _max_over_ranks([value])
    return most


def _max_over_ranks(values: list[float]) -> list[float]:
    return _reduced(torch.tensor(values, dtype=torch.float64), torch.maximum).tolist()


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the ranks' lists in rank order, on every rank."""
    if world_size() == 1:
        return items

    def join(mine: Tensor, theirs: Tensor) -> Tensor:
        return _to_bytes(_objects(mine) | _objects(theirs))

    def swapped(mine: Tensor, other: int) -> Tensor:
        num_bytes = _swapped(torch.tensor([mine.numel()]), other)
        return _swapped(mine, other, torch.empty(int(num_bytes), dtype=torch.uint8))

    packets: dict[int, bytes] = _objects(_combined(_to_bytes({rank(): pickle.dumps(items)}), join, swapped))
    return [item for sender in range(world_size()) for item in pickle.loads(packets[sender])]


def exchange(outgoing: list[list[Any]]) -> list[Any]:
    """Send `outgoing[r]` to rank r (all-to-all); returns the items received, in order of sender rank."""
    if world_size() == 1:
        return outgoing[0]
    packets = {other: _to_bytes(items) for other, items in enumerate(outgoing) if items and other != rank()}
    sizes = gather_lists([{other: packet.numel() for other, packet in packets.items()}])
    incoming = {
        sender: torch.empty(of_sender[rank()], dtype=torch.uint8)
        for sender, of_sender in enumerate(sizes)
        if rank() in of_sender
    }
    transfers = [dist.P2POp(dist.isend, packet, other) for other, packet in packets.items()]
    transfers += [dist.P2POp(dist.irecv, packet, sender) for sender, packet in incoming.items()]
    for transfer in dist.batch_isend_irecv(transfers) if transfers else []:
        transfer.wait()
    received = {sender: _objects(packet) for sender, packet in incoming.items()} | {rank(): outgoing[rank()]}
    return [item for sender in sorted(received) for item in received[sender]]


def _reduced(values: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All ranks' values combined by a commutative function: so the result is the same on all of them."""
    return _combined(values, combine, _swapped) if world_size() > 1 else values


def _combined(value: T, combine: Callable[[T, T], T], swapped: Callable[[T, int], T]) -> T:
    """The ranks' values combined in pairs. Ranks beyond the largest power of two join the first ones.

    Args:
        swapped: `swapped(value, other)` sends a value to a rank that calls it too; returns that rank's.
    """
    core = 1 << (world_size().bit_length() - 1)
    if rank() >= core:
        swapped(value, rank() - core)
        return swapped(value, rank() - core)
    has_partner = rank() + core < world_size()
    if has_partner:
        value = combine(value, swapped(value, rank() + core))
    for other in _partners(core):
        value = combine(value, swapped(value, other))
    if has_partner:
        swapped(value, rank() + core)
    return value


def _partners(core: int) -> Iterator[int]:
    distance = 1
    while distance < core:
        yield rank() ^ distance
        distance *= 2


def _swapped(mine: Tensor, other: int, theirs: Tensor | None = None) -> Tensor:
    """Send a tensor to a rank and receive its own; into `theirs` if that has another size."""
    theirs = torch.empty_like(mine) if theirs is None else theirs
    sending = dist.isend(mine, other)
    dist.recv(theirs, other)
    assert sending is not None, "this rank is in the group"
    sending.wait()
    return theirs


def _to_bytes(items: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8)


def _objects(packet: Tensor) -> Any:
    return pickle.loads(packet.numpy().data)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(metrics: Metrics) -> Metrics:
    """Reduce metrics over ranks; every rank must pass the same keys."""
    in_order = [(key, metrics[key]) for key in sorted(metrics)]
    addends = [number for _, metric in in_order if not isinstance(metric, Max) for number in metric.addends()]
    totals = iter(sum_over_ranks(torch.tensor(addends, dtype=torch.float64)).tolist())
    values = [metric.result() for _, metric in in_order if isinstance(metric, Max)]
    maxima = iter(_max_over_ranks(values) if values else [])
    added = Metrics()
    for key, metric in in_order:
        if isinstance(metric, Max):
            added[key] = Max(next(maxima))
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
