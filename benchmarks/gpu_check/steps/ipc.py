"""Buffers that another process reads in place: CUDA IPC on a GPU, a memory file on a CPU.

What rayrlhf needs of it: the bytes are right, they are read at the speed of memory, and after a push the
sender holds no more of the GPU than before, once it has released what it caches.
"""

from __future__ import annotations

import gc
import time

import torch
from torch import Tensor

from benchmarks.gpu_check.measure import reserved_bytes, seconds_of, synchronize
from benchmarks.gpu_check.peer import Peer, PeerFailed
from benchmarks.gpu_check.step import GIB, MIB, Context
from rayrlhf.train.device_memory import release_cached_memory
from rayrlhf.weights.shared_memory import SharedBuffer, attach

ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # newer and older name
LARGEST_WEIGHT = 128_256 * 4096 * 2  # Llama-3-8B's embedding in bf16: a bucket of its own


def fill(flat: Tensor, seed: int) -> Tensor:
    """The same bytes for the same seed in every process."""
    return flat.random_(0, 256, generator=torch.Generator(flat.device).manual_seed(seed))


class Owner:
    """The trainer's process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[int, SharedBuffer] = {}

    def make(self, number: int, num_bytes: int) -> bytes:
        self.buffers[number] = SharedBuffer(num_bytes, self.device)
        fill(self.buffers[number].flat, number)
        synchronize(self.device)
        return self.buffers[number].handle

    def free(self, number: int) -> None:
        """And write into memory of the same size, which would be the same memory if nobody held it."""
        num_bytes = self.buffers.pop(number).flat.numel()
        gc.collect()
        torch.empty(num_bytes, dtype=torch.uint8, device=self.device).fill_(7)
        synchronize(self.device)

    def reserved(self, release: bool) -> int:
        if release:
            release_cached_memory()
        return reserved_bytes(self.device)


class Reader:
    """The engine's process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.view: Tensor | None = None

    def attach(self, handle: bytes, num_bytes: int) -> float:
        """Seconds to map the buffer."""
        started = time.perf_counter()
        self.view = attach(handle, self.device, num_bytes)
        return time.perf_counter() - started

    def reads(self, number: int) -> bool:
        assert self.view is not None
        wanted = fill(torch.empty_like(self.view), number)
        return bool(torch.equal(self.view, wanted))

    def copy_seconds(self) -> float:
        view = self.view
        assert view is not None
        own = torch.empty_like(view)
        return seconds_of(lambda: own.copy_(view), self.device)

    def detach(self) -> None:
        self.view = None
        release_cached_memory()


def handles(context: Context) -> None:
    if not context.on_gpu:
        _handles(context, "memory file", {})
        return
    for expandable in (False, True):
        name = "expandable segments" if expandable else "segments"
        variables: dict[str, str] = dict.fromkeys(ALLOCATORS, f"expandable_segments:{expandable}")
        try:
            _handles(context, name, variables)
        except PeerFailed as error:
            context.record(f"{name}: failed", str(error).strip().splitlines()[-1])
            if not expandable:  # the default
                raise
        else:
            context.record(f"{name}: work", True)


def _handles(context: Context, name: str, environment: dict[str, str]) -> None:
    num_bytes = GIB if context.on_gpu else 16 * MIB
    device = context.device
    with Peer(Owner, device, environment=environment) as owner, Peer(Reader, device) as reader:
        before = _reserved(owner)
        handle = owner.ask("make", 1, num_bytes)
        context.record(f"{name}: size of a handle", len(handle), "bytes")
        context.record(f"{name}: map, first", 1e3 * reader.ask("attach", handle, num_bytes), "ms")
        assert reader.ask("reads", 1), "the reader saw other bytes than were written"
        seconds = reader.ask("copy_seconds")
        context.record(f"{name}: copied by the reader", 1e-9 * num_bytes / seconds, "GB/s")

        owner.ask("free", 1)
        intact = reader.ask("reads", 1)
        context.record(f"{name}: a mapped buffer outlives its owner's reference", intact)
        assert intact, "a reader's buffer was given to another tensor while it was mapped"
        context.record(f"{name}: reserved while a reader maps it", _reserved(owner) / GIB, "GiB")
        reader.ask("detach")
        context.record(f"{name}: reserved after it let go", _reserved(owner) / GIB, "GiB")
        after = _reserved(owner, release=True)
        context.record(f"{name}: reserved after release_cached_memory", after / GIB, "GiB")
        assert after <= before + 64 * MIB, f"{after} bytes stay reserved, {before} before"

        handle = owner.ask("make", 2, num_bytes)
        context.record(f"{name}: map, second", 1e3 * reader.ask("attach", handle, num_bytes), "ms")
        assert reader.ask("reads", 2), "the second buffer's bytes are wrong"
        reader.ask("detach")
        owner.ask("free", 2)
        owner.ask("make", 3, num_bytes)
        owner.ask("free", 3)
        left = _reserved(owner, release=True)
        context.record(f"{name}: reserved after one that nobody mapped", left / GIB, "GiB")
    _record_lost_handle(context, name, environment)


def _record_lost_handle(context: Context, name: str, environment: dict[str, str]) -> None:
    """What a reader gets that is late: the owner has freed the buffer before it was mapped."""
    num_bytes = 64 * MIB if context.on_gpu else MIB
    with Peer(Owner, context.device, environment=environment) as owner:
        with Peer(Reader, context.device) as reader:
            handle = owner.ask("make", 1, num_bytes)
            owner.ask("free", 1)
            try:
                reader.ask("attach", handle, num_bytes)
                outcome = "mapped, bytes intact" if reader.ask("reads", 1) else "mapped, OTHER BYTES"
            except PeerFailed as error:
                outcome = f"refused: {str(error).strip().splitlines()[-1]}"
        context.record(f"{name}: mapped after its owner freed it", outcome)
        if not context.on_gpu:
            assert outcome.startswith("refused"), outcome


def _reserved(owner: Peer, *, release: bool = False) -> int:
    return owner.ask("reserved", release)
