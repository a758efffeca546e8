"""How much slower an engine decodes while a process on the same GPU waits for others.

A rank whose rollouts are done waits for the other ranks. In an NCCL collective it waits in a kernel that
spins, which without MPS takes turns with the engine's kernels; rayrlhf waits in gloo, on the host. The engine
is a CUDA graph of products with few rows, which read all weights as decoding does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.gpu_check.measure import synchronize
from benchmarks.gpu_check.peer import Peer
from benchmarks.gpu_check.step import Context
from rayrlhf.train.collectives import sum_over_ranks

SPIN_CYCLES = 50_000_000  # about 30 ms


class Waiting:
    """The trainer's process."""

    def __init__(self, store: str, device: torch.device) -> None:
        dist.init_process_group("gloo", init_method=store, rank=1, world_size=2)
        self.device = device
        self.left = torch.ones(256, 256, device=device)  # a process with a CUDA context
        synchronize(device)

    def spin(self, seconds: float) -> None:
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            if self.device.type == "cuda":
                torch.cuda._sleep(SPIN_CYCLES)
            else:
                self.left = (self.left @ self.left).clamp_(max=1.0)
            synchronize(self.device)

    def wait_in_gloo(self) -> float:
        return float(sum_over_ranks(torch.ones(1)))


def run(context: Context) -> None:
    seconds = 4.0 if context.on_gpu else 0.5
    decode = _graph(context.device) if context.on_gpu else _products(context.device)
    if not context.on_gpu:
        context.record("CUDA graph", "skipped: CUDA graphs need a GPU; the products run one by one")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        peer = Peer(Waiting, store, context.device)
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=2)
        with peer:
            alone = _rate(decode, context.device, seconds)
            context.record("alone", alone, "steps/s")
            peer.start("spin", seconds + 1)
            time.sleep(0.5)
            spinning = _rate(decode, context.device, seconds)
            peer.answer()
            peer.start("wait_in_gloo")
            time.sleep(0.5)
            waiting = _rate(decode, context.device, seconds)
            assert float(sum_over_ranks(torch.ones(1))) == peer.answer() == 2.0
            again = _rate(decode, context.device, seconds)
        dist.destroy_process_group()
    context.record("alone, again", again, "steps/s")
    context.record("slowdown while another process spins on the device", alone / spinning, "x")
    context.record("slowdown while another process waits in gloo", alone / waiting, "x")
    if context.on_gpu:
        assert alone / waiting < 1.1, "waiting in gloo slows an engine on the same GPU down"


def _products(device: torch.device) -> Callable[[], object]:
    layers, hidden, dtype = (32, 4096, torch.bfloat16) if device.type == "cuda" else (4, 256, torch.float32)
    weights = [torch.randn(hidden, hidden, device=device, dtype=dtype) / hidden**0.5 for _ in range(layers)]
    rows = torch.randn(64, hidden, device=device, dtype=dtype)

    def step() -> torch.Tensor:
        output = rows
        for weight in weights:
            output = output @ weight
        return output

    return step


def _graph(device: torch.device) -> Callable[[], object]:
    step = _products(device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # cuBLAS allocates its workspace before the capture
        step()
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    replay = graph.replay
    return lambda: (replay(), kept)


def _rate(decode: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Steps per second, with a synchronisation after each, as an engine samples."""
    decode()
    synchronize(device)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        decode()
        synchronize(device)
        steps += 1
    return steps / (time.perf_counter() - started)
