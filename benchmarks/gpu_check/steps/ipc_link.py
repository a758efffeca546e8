"""A push of weights by rayrlhf's own `IpcLink`, as between a trainer and the engine on its GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.gpu_check.measure import reserved_bytes, synchronize
from benchmarks.gpu_check.peer import Peer
from benchmarks.gpu_check.step import GIB, MIB, Context
from benchmarks.gpu_check.steps.ipc import LARGEST_WEIGHT, fill
from rayrlhf.train.device_memory import release_cached_memory
from rayrlhf.weights.transfer_group import Receiver, TransferGroup, join
from rayrlhf.weights.transfer_store import TransferStore

KEY = "this device"
SECONDS = 60.0


class Member:
    """Of the transfer group: the trainer, with rank 0, or the engine."""

    def __init__(self, transfer_group: TransferGroup, rank: int, device: torch.device) -> None:
        self.link = join(transfer_group, rank=rank, device=device, key=KEY)
        self.device = device

    def send(self, sizes: Sequence[int], verified: bool) -> float:
        """Seconds of the push. Unless the bytes are verified, they are not written."""
        synchronize(self.device)
        started = time.perf_counter()
        for number, num_bytes in enumerate(sizes):
            flat = self.link.buffer(num_bytes)
            if verified:
                fill(flat, number)
            self.link.send(flat)
        self.link.flush()
        return time.perf_counter() - started

    def receive(self, sizes: Sequence[int], verified: bool) -> int:
        """Copy each bucket, as an engine does. Returns how many had other bytes than were sent."""
        own = torch.empty(max(sizes), dtype=torch.uint8, device=self.device)
        num_wrong = 0
        for number, num_bytes in enumerate(sizes):
            copied = own[:num_bytes].copy_(self.link.receive(num_bytes))
            self.link.release()
            if verified:
                num_wrong += not torch.equal(copied, fill(torch.empty_like(copied), number))
        return num_wrong

    def reserved(self, release: bool) -> int:
        if release:
            release_cached_memory()
        return reserved_bytes(self.device)

    def end(self) -> None:
        self.link.end("done")


def run(context: Context) -> None:
    sizes = [128 * MIB] * 24 + [LARGEST_WEIGHT] if context.on_gpu else [2 * MIB] * 6 + [8 * MIB]
    store = TransferStore()
    group = TransferGroup("ipc", store.address, {0: Receiver(0, (KEY,))}, SECONDS)
    with Peer(Member, group, 0, context.device) as trainer, Peer(Member, group, 1, context.device) as engine:
        before = trainer.ask("reserved", False)
        assert _push(trainer, engine, sizes, verified=True)[1] == 0, "buckets arrived with other bytes"
        seconds = min(_push(trainer, engine, sizes, verified=False)[0] for _ in range(3))
        context.record("push", sum(sizes) / GIB, "GiB")
        context.record("push, seconds", seconds, "s")
        context.record("push, rate", 1e-9 * sum(sizes) / seconds, "GB/s")
        for name, member in (("trainer", trainer), ("engine", engine)):
            held, kept = member.ask("reserved", False), member.ask("reserved", True)
            context.record(f"{name}: reserved after a push", held / GIB, "GiB")
            context.record(f"{name}: reserved after release_cached_memory", kept / GIB, "GiB")
            assert kept <= before + 64 * MIB, f"{kept} bytes stay reserved by the {name}"
        trainer.ask("end")
    store.close()


def _push(trainer: Peer, engine: Peer, sizes: Sequence[int], *, verified: bool) -> tuple[float, int]:
    """Seconds, and the number of wrong buckets."""
    engine.start("receive", sizes, verified)
    trainer.start("send", sizes, verified)
    return trainer.answer(), engine.answer()
