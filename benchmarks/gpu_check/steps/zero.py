"""Updates by rayrlhf's learner under DeepSpeed's ZeRO 2 and 3, with a single rank.

That states which go to the host and back between updates change no loss, what that takes, and what gradients
cost that are added up in bf16 or in fp32.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check.batches import make_batch, make_policy
from benchmarks.gpu_check.measure import synchronize
from benchmarks.gpu_check.shapes import llama
from benchmarks.gpu_check.step import GIB, Context
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.attention import attention_implementation
from rayrlhf.policy.losses import TextObjective, policy_forward
from rayrlhf.train import process_group
from rayrlhf.train.device_memory import release_cached_memory
from rayrlhf.train.learner import Learner, Term

UPDATES = 4
BATCHES = 3  # micro-batches of an update, whose gradients add up


@dataclass
class Measured:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of updates
    offload_seconds: list[float] = field(default_factory=list)
    reload_seconds: list[float] = field(default_factory=list)
    offloaded_bytes: int = 0
    peak_bytes: int = 0


def run_2(context: Context) -> None:
    _run(context, 2)


def run_3(context: Context) -> None:
    _run(context, 3)


def _run(context: Context, stage: int) -> None:
    with _one_rank(context):
        plain = _updates(context, stage)
        tokens = BATCHES * sum(_lengths(context))
        context.record("rate", tokens / min(plain.seconds), "tokens/s")
        context.record("peak memory", plain.peak_bytes / GIB, "GiB")
        offloaded = _updates(context, stage, offloading=True)
        context.record("offloaded", offloaded.offloaded_bytes / GIB, "GiB")
        turns = {"offload": offloaded.offload_seconds, "reload": offloaded.reload_seconds}
        for name, seconds in turns.items():
            context.record(f"{name}, first", seconds[0], "s")
            context.record(f"{name}, later", min(seconds[1:]), "s")
        assert plain.losses[-1] < plain.losses[0], f"updates do not lower the loss: {plain.losses}"
        largest = max(abs(a - b) / abs(a) for a, b in zip(plain.losses, offloaded.losses, strict=True))
        context.record("largest relative difference of losses with offloading", largest)
        # On a GPU the backward pass of attention adds in any order.
        assert largest <= (1e-3 if context.on_gpu else 0.0), (plain.losses, offloaded.losses)
        assert not context.on_gpu or offloaded.offloaded_bytes > 0, "nothing was offloaded"

        wide = _updates(context, stage, grad_accum_dtype="float32")
        context.record("fp32 gradients: rate", tokens / min(wide.seconds), "tokens/s")
        context.record("fp32 gradients: peak memory", wide.peak_bytes / GIB, "GiB")
        of_norm = abs(plain.norms[0] - wide.norms[0]) / wide.norms[0]
        context.record("bf16 gradients: relative difference of the first gradient's norm", of_norm)
        of_loss = abs(plain.losses[-1] - wide.losses[-1]) / abs(wide.losses[-1])
        context.record(
            f"bf16 gradients: relative difference of the loss after {UPDATES - 1} updates", of_loss
        )
        assert of_norm < 0.02, (plain.norms, wide.norms)


def _updates(
    context: Context, stage: int, *, offloading: bool = False, grad_accum_dtype: str = "weights"
) -> Measured:
    """A few updates of the same model on the same batches, in bf16."""
    device = context.device
    kernel = attention_implementation("auto", device)
    size = "1b" if context.on_gpu else "tiny"
    policy = make_policy(size, kernel, torch.bfloat16, device, chunk=2048)
    settings: Any = {"num_steps": 10, "zero_stage": stage, "grad_accum_dtype": grad_accum_dtype}
    learner = Learner(policy, TrainConfig(**settings), lr=1e-4, dtype=torch.bfloat16, name="actor")
    term = _term(context)
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    measured = Measured()
    for step in range(UPDATES):
        synchronize(device)
        started = time.perf_counter()
        metrics = learner.update(term, step=step).results()
        synchronize(device)
        measured.seconds.append(time.perf_counter() - started)
        measured.losses.append(metrics["loss/actor"])
        measured.norms.append(metrics["loss/actor_grad_norm"])
        if offloading:
            times = [time.perf_counter()]
            measured.offloaded_bytes = max(measured.offloaded_bytes, learner.offload())
            synchronize(device)
            times.append(time.perf_counter())
            learner.reload()
            synchronize(device)
            times.append(time.perf_counter())
            measured.offload_seconds.append(times[1] - times[0])
            measured.reload_seconds.append(times[2] - times[1])
    if context.on_gpu:
        measured.peak_bytes = torch.cuda.max_memory_allocated()
    learner.engine.destroy()
    del learner, policy, term
    gc.collect()
    release_cached_memory()
    return measured


def _lengths(context: Context) -> list[int]:
    return [512] * 8 if context.on_gpu else [32, 16]


def _term(context: Context) -> Term:
    vocabulary = llama("1b" if context.on_gpu else "tiny").vocab_size
    batches = [
        make_batch(_lengths(context), vocabulary, context.device, seed=seed) for seed in range(BATCHES)
    ]
    # The mean negative log-probability: the first update's policy loss is the same whatever the weights are.
    num_tokens = sum(float(batch.loss_mask.sum()) for batch in batches)
    return Term(batches, policy_forward(1.0), TextObjective(1.0, num_tokens))


@contextmanager
def _one_rank(context: Context) -> Iterator[None]:
    os.environ["LOCAL_RANK"] = "0"
    if context.on_gpu:
        torch.cuda.set_device(context.device)
    backend = process_group.ON_GPUS if context.on_gpu else process_group.ON_CPUS
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()
