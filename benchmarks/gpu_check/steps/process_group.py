"""A process group like that of pushes over NCCL: made, used, aborted, and its store gone."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu_check.measure import synchronize
from benchmarks.gpu_check.step import MIB, Context
from rayrlhf.weights.transfer_group import Backend, TransferGroup, join
from rayrlhf.weights.transfer_store import TransferStore

SECONDS = 60.0
AFTERWARDS_SECONDS = 3.0  # in which a watchdog thread would notice that the store is gone


def run(context: Context) -> None:
    """Twice: an engine that restarts makes the trainer form another group."""
    for turn in ("first", "second"):
        _form_and_leave(context, turn)
    rows = torch.ones(64, 64, device=context.device)
    assert float((rows @ rows).sum()) == 64.0**3, "the device computes nothing any more"


def _form_and_leave(context: Context, turn: str) -> None:
    backend: Backend = "nccl" if context.on_gpu else "gloo"
    store = TransferStore()
    alone = TransferGroup(backend, store.address, {}, SECONDS)
    times = [time.perf_counter()]

    def took(what: str) -> None:
        synchronize(context.device)
        times.append(time.perf_counter())
        context.record(f"{backend}, {turn}: {what}", 1e3 * (times[-1] - times[-2]), "ms")

    link = join(alone, rank=0, device=context.device, key="")
    took("create")
    for what in ("connect and broadcast", "broadcast"):
        flat = link.buffer(64 * MIB if context.on_gpu else MIB)
        flat.fill_(3)
        link.send(flat)
        link.flush()
        took(what)
        assert bool((flat == 3).all()), "a broadcast changed its root's bytes"
    link.end("done")
    took("abort")
    store.close()
    took("close the store")
    time.sleep(AFTERWARDS_SECONDS if context.on_gpu else 0.5)
