"""Updates of a 1B model and of an 8B-shaped one: tokens per second and the share of the GPU's peak.

The update is rayrlhf's forward pass and PPO loss over one packed micro-batch, with activation checkpointing,
and torch's fused AdamW on the weights themselves. DeepSpeed is left out, so that this runs without it: its
updates are measured by the steps `zero2` and `zero3`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.batches import make_batch, make_policy
from benchmarks.gpu_check.measure import seconds_of
from benchmarks.gpu_check.shapes import llama, peak_tflops, update_flops
from benchmarks.gpu_check.step import GIB, Context
from rayrlhf.algorithms.aggregate import aggregate
from rayrlhf.algorithms.policy_losses import ppo
from rayrlhf.batch import PolicyBatch
from rayrlhf.models.attention import VARLEN_SDPA, attention_implementation
from rayrlhf.models.logprobs import PolicyModel, TokenLogprobs

# 16,384 tokens in sequences as long as responses are.
LENGTHS_ON_GPU = [256, 384, 512, 640, 768, 896, 1024, 1152] * 2 + [1280, 1792, 2048]
LENGTHS_ON_CPU = [16, 48, 64]
CHUNKS_ON_GPU, CHUNKS_ON_CPU = (256, 2048), (16, 128)
NUM_OPERATIONS = 8  # of the profile, recorded


def run_1b(context: Context) -> None:
    _measure(context, "1b", "1b" if context.on_gpu else "tiny")


def run_8b(context: Context) -> None:
    _measure(context, "8b", "8b" if context.on_gpu else "tiny, untied")


def _measure(context: Context, name_of_trace: str, size: str) -> None:
    on_gpu, device = context.on_gpu, context.device
    lengths = LENGTHS_ON_GPU if on_gpu else LENGTHS_ON_CPU
    config = llama(size)
    kernel = attention_implementation("auto", device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    policy = make_policy(size, kernel, dtype, device, chunk=CHUNKS_ON_GPU[0])
    batch = make_batch(lengths, config.vocab_size, device)
    # With a rate of 0 all variants see the same weights; the work is that of any rate.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    num_loss_tokens = int(batch.loss_mask.sum())
    flops = update_flops(config, lengths, num_loss_tokens)
    peak = peak_tflops(torch.cuda.get_device_name(device)) if on_gpu else None
    context.record("parameters", sum(parameter.numel() for parameter in policy.parameters()) / 1e9, "billion")
    context.record("tokens of an update", sum(lengths))
    if peak is not None:
        context.record("peak of this GPU, bf16, data sheet", peak, "TFLOP/s")

    of_first: Tensor | None = None
    for name, attention, chunk in _variants(kernel, CHUNKS_ON_GPU if on_gpu else CHUNKS_ON_CPU):
        policy.causal_lm.set_attn_implementation(attention)
        policy.head.chunk_tokens = chunk
        with torch.no_grad():
            logprobs = _forward(policy, batch).logprobs
        of_first = logprobs if of_first is None else of_first
        difference = float((logprobs - of_first).abs().sum() / num_loss_tokens)
        context.record(f"{name}: mean difference of log-probabilities from the first", difference)
        assert difference < (0.05 if on_gpu else 1e-5), (name, difference)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(lambda: _update(policy, optimizer, batch), device, repeats=3)
        context.record(f"{name}: rate", sum(lengths) / seconds, "tokens/s")
        context.record(f"{name}: rate of model FLOPs", 1e-12 * flops / seconds, "TFLOP/s")
        if peak is not None:
            context.record(f"{name}: MFU", 1e-10 * flops / seconds / peak, "%")
        if on_gpu:
            context.record(f"{name}: peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
    _profile(context, name_of_trace, lambda: _update(policy, optimizer, batch))


def _variants(kernel: str, chunks: tuple[int, int]) -> list[tuple[str, str, int]]:
    """Name, attention, rows per chunk of the head. The last is what is profiled."""
    pairs = [(VARLEN_SDPA, chunks[1])] * (kernel != VARLEN_SDPA) + [(kernel, chunk) for chunk in chunks]
    return [(f"{attention}, head by {chunk}", attention, chunk) for attention, chunk in pairs]


def _forward(policy: PolicyModel, batch: PolicyBatch) -> TokenLogprobs:
    return policy(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)


def _loss(policy: PolicyModel, batch: PolicyBatch) -> Tensor:
    output = _forward(policy, batch)
    assert batch.advantages is not None
    per_token, _ = ppo(
        output.logprobs,
        output.logprobs.detach(),
        batch.advantages,
        batch.loss_mask,
        batch.cu_seqlens,
        clip_low=0.2,
        clip_high=0.2,
    )
    return aggregate(
        "token_mean",
        per_token,
        batch.loss_mask,
        batch.cu_seqlens,
        global_tokens=float(batch.loss_mask.sum()),
        global_sequences=float(batch.num_sequences),
        constant_length=1.0,
    )


def _update(policy: PolicyModel, optimizer: torch.optim.Optimizer, batch: PolicyBatch) -> None:
    _loss(policy, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _profile(context: Context, name: str, update: Callable[[], None]) -> None:
    """A trace for Perfetto, and the operations that take longest."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * context.on_gpu
    with profile(activities=activities) as profiler:
        update()
        if context.on_gpu:
            torch.cuda.synchronize()
    context.traces.mkdir(parents=True, exist_ok=True)
    path = context.traces / f"update_{name}.json.gz"
    profiler.export_chrome_trace(str(path))
    context.record("trace", str(path))
    key = "self_device_time_total" if context.on_gpu else "self_cpu_time_total"
    events: list[Any] = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    for event in events[:NUM_OPERATIONS]:
        share = 100 * getattr(event, key) / total
        context.record(f"time in {event.key[:60]}", share, "%")
