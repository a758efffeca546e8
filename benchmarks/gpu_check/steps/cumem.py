"""Engine and trainer alternate on one GPU: who holds which memory when.

As in a colocated run: the engine sleeps, the trainer computes, the engine's weights wake and take a push, and
then its KV cache wakes at its fixed addresses. That needs all of its memory at once, which the trainer's
caching allocator still holds; after `release_cached_memory` it must succeed.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_check.measure import reserved_bytes
from benchmarks.gpu_check.peer import Peer
from benchmarks.gpu_check.step import GIB, MIB, Context, Skip
from benchmarks.gpu_check.steps.cumem_pool import CumemPool, find_extension
from benchmarks.gpu_check.steps.ipc import fill
from rayrlhf.train.device_memory import release_cached_memory
from rayrlhf.weights.shared_memory import SharedBuffer, attach

WEIGHTS, KV_CACHE, TRAINED = 0.15, 0.45, 0.5  # shares of the free memory; together more than there is
BUCKETS = 8
PIECES = 16  # of the KV cache, and of the trainer's states
CUDA = torch.device("cuda", 0)


class Engine:
    def __init__(self, extension: Path, weight_bytes: int, cache_bytes: int) -> None:
        torch.cuda.set_device(CUDA)
        self.pool = CumemPool(extension)
        self.weights = self.pool.tensors("weights", BUCKETS, weight_bytes // BUCKETS)
        self.cache = self.pool.tensors("kv_cache", PIECES, cache_bytes // PIECES)
        for tensor in (*self.weights, *self.cache):
            tensor.fill_(1)
        torch.cuda.synchronize()

    def sleep(self) -> int:
        """Bytes that became free."""
        before, _ = torch.cuda.mem_get_info(CUDA)
        self.pool.sleep()
        return torch.cuda.mem_get_info(CUDA)[0] - before

    def wake(self, tag: str) -> tuple[str, float]:
        """Why memory could not be mapped, or nothing; and the seconds that it took."""
        started = time.perf_counter()
        try:
            self.pool.wake(tag)
        except RuntimeError as error:
            return str(error), time.perf_counter() - started
        return "", time.perf_counter() - started

    def take(self, number: int, handle: bytes) -> bool:
        """Copy a bucket into its weights. True if the bytes are right."""
        weight = self.weights[number]
        weight.copy_(attach(handle, CUDA, weight.numel()))
        torch.cuda.synchronize()
        torch.cuda.ipc_collect()
        return bool(torch.equal(weight, fill(torch.empty_like(weight), number)))

    def use_cache(self) -> bool:
        for number, tensor in enumerate(self.cache):
            tensor.fill_(number)
        return all(bool((tensor == number).all()) for number, tensor in enumerate(self.cache))

    def has_weights(self) -> bool:
        """Whether the weights are still those of the push."""
        return all(
            torch.equal(weight, fill(torch.empty_like(weight), number))
            for number, weight in enumerate(self.weights)
        )

    def release(self) -> None:
        release_cached_memory()


class Trainer:
    def __init__(self) -> None:
        torch.cuda.set_device(CUDA)
        self.sending: dict[int, SharedBuffer] = {}

    def compute(self, num_bytes: int) -> int:
        """Take memory for states and give it back to torch's cache. Returns what torch holds."""
        size = num_bytes // PIECES
        states: list[Tensor] = [torch.ones(size, dtype=torch.uint8, device=CUDA) for _ in range(PIECES)]
        torch.cuda.synchronize()
        del states
        return reserved_bytes(CUDA)

    def send(self, number: int, num_bytes: int) -> bytes:
        self.sending = {number: SharedBuffer(num_bytes, CUDA)}
        fill(self.sending[number].flat, number)
        torch.cuda.synchronize()
        return self.sending[number].handle

    def release(self) -> int:
        self.sending.clear()
        release_cached_memory()
        return reserved_bytes(CUDA)


def run(context: Context) -> None:
    if not context.on_gpu:
        raise Skip("needs a GPU: memory mapped at fixed addresses is CUDA's")
    extension = find_extension(context.cumem)
    context.record("allocator", str(extension))
    with Peer(Trainer) as trainer:
        trainer.ask("compute", PIECES * MIB)  # its CUDA context exists before memory is counted
        free = _free_bytes()
        weight_bytes, cache_bytes = (
            int(free * share) // (64 * MIB) * 64 * MIB for share in (WEIGHTS, KV_CACHE)
        )
        context.record("free at first", free / GIB, "GiB")
        with Peer(Engine, extension, weight_bytes, cache_bytes) as engine:
            freed = engine.ask("sleep")
            context.record("freed by sleeping", freed / GIB, "GiB")
            assert freed >= 0.99 * (weight_bytes + cache_bytes), "memory of a sleeping engine is still taken"
            held = trainer.ask("compute", int(free * TRAINED))
            context.record("held by the trainer's cache", held / GIB, "GiB")
            error, seconds = engine.ask("wake", "weights")
            assert not error, f"the weights do not wake: {error}"
            context.record("weights woke in", 1e3 * seconds, "ms")
            for number in range(BUCKETS):
                handle = trainer.ask("send", number, weight_bytes // BUCKETS)
                assert engine.ask("take", number, handle), f"bucket {number} arrived with other bytes"
            engine.ask("release")
            error, _ = engine.ask("wake", "kv_cache")
            context.record("KV cache, before release_cached_memory", error or "woke")
            assert "out of memory" in error, f"the trainer's cache did not stand in the way: {error!r}"
            context.record("held after release_cached_memory", trainer.ask("release") / GIB, "GiB")
            error, seconds = engine.ask("wake", "kv_cache")
            context.record("KV cache, after release_cached_memory", error or "woke")
            assert not error, f"the KV cache does not wake: {error}"
            context.record("KV cache woke in", 1e3 * seconds, "ms")
            assert engine.ask("use_cache"), "the KV cache does not keep what is written to it"
            assert engine.ask("has_weights"), "the pushed weights changed"


def _free_bytes() -> int:
    """By a process of its own, which is gone when the measurement begins."""
    with Peer(_Free) as peer:
        return peer.ask("free_bytes")


class _Free:
    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(CUDA)[0]
