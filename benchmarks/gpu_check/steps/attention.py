"""Attention over packed sequences: equal to each sequence alone, and how fast by which kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.gpu_check.measure import relative_error, seconds_of
from benchmarks.gpu_check.shapes import llama
from benchmarks.gpu_check.step import Context
from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.models.attention import (
    VARLEN,
    VARLEN_SDPA,
    attending_layers,
    attention_implementation,
    packed_inputs,
    varlen,
    varlen_sdpa,
)

Attend = Callable[..., tuple[Tensor, None]]
KERNELS: dict[str, Attend] = {VARLEN: varlen, VARLEN_SDPA: varlen_sdpa}
LENGTHS = [70, 1, 200, 33]
WINDOWS = {"causal": None, "window of 48": 48}
# Streams of as many tokens; the second is what rollouts look like.
ON_GPU = {
    "64 x 256": [256] * 64,
    "25 mixed": [96, 160, 224, 288, 352, 416, 480, 544, 608, 672, 736, 800] * 2 + [5632],
    "4 x 4096": [4096] * 4,
}
ON_CPU = {"8 x 16": [16] * 8, "1 x 128": [128]}


class Layer(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def kernels(context: Context) -> None:
    """rayrlhf's attention functions themselves, forward and backward."""
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    layer, inputs = _layer_and_inputs(context.device, dtype, LENGTHS, heads=8, kv_heads=2, head_dim=64)
    for window_name, window in WINDOWS.items():
        wanted = _dense([each.detach().double() for each in inputs], LENGTHS, window)
        errors: dict[str, float] = {}
        for name, attend in KERNELS.items():
            with attending_layers() as by_sdpa:
                got = _with_gradients(attend, layer, inputs, LENGTHS, window)
            if name == VARLEN:
                context.record(f"{name} is computed by", "SDPA" if by_sdpa else "torch's varlen kernel")
                assert bool(by_sdpa) != context.on_gpu, (
                    "the varlen kernel is for GPUs, and was not used there"
                )
            errors[name] = max(relative_error(g, w) for g, w in zip(got, wanted, strict=True))
            context.record(f"{name}, {window_name}: error against float64", errors[name])
        assert errors[VARLEN_SDPA] < (0.02 if context.on_gpu else 1e-5), errors
        assert errors[VARLEN] < 3 * errors[VARLEN_SDPA] + 1e-6, errors
    for stream, lengths in (ON_GPU if context.on_gpu else ON_CPU).items():
        _record_speed(context, stream, lengths, dtype)


def _record_speed(context: Context, stream: str, lengths: list[int], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = (32, 8, 128) if context.on_gpu else (4, 2, 32)
    layer, inputs = _layer_and_inputs(context.device, dtype, lengths, heads, kv_heads, head_dim)
    seconds: dict[str, float] = {}

    def measure(name: str, attend: Attend) -> None:
        seconds[name] = seconds_of(
            lambda: _with_gradients(attend, layer, inputs, lengths, None), context.device
        )
        context.record(f"{name}, {stream}: forward and backward", 1e3 * seconds[name], "ms")

    for name, attend in KERNELS.items():
        measure(name, attend)
    context.record(f"{stream}: {VARLEN_SDPA} over {VARLEN}", seconds[VARLEN_SDPA] / seconds[VARLEN], "x")
    attention: Any = importlib.import_module("torch.nn.attention")
    if not context.on_gpu or not hasattr(attention, "list_flash_attention_impls"):
        return
    for implementation in attention.list_flash_attention_impls():
        try:
            attention.activate_flash_attention_impl(implementation)
        except (ImportError, RuntimeError) as error:
            context.record(implementation, f"cannot be used: {error}")
            continue
        measure(f"{VARLEN} by {implementation}", varlen)
        attention.restore_flash_attention_impl()


def _layer_and_inputs(
    device: torch.device, dtype: torch.dtype, lengths: list[int], heads: int, kv_heads: int, head_dim: int
) -> tuple[Layer, list[Tensor]]:
    """Query, key and value [1, heads, T, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(lengths), head_dim) for count in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return Layer(heads // kv_heads), [tensor.requires_grad_() for tensor in tensors]


def _with_gradients(
    attend: Attend, layer: Layer, inputs: list[Tensor], lengths: list[int], window: int | None
) -> tuple[Tensor, ...]:
    """The output [1, T, heads, head_dim], and the gradients of its squares' sum by the inputs."""
    cu_seqlens = cu_seqlens_of(lengths).to(inputs[0].device)
    sides = {f"cu_seq_lens_{side}": cu_seqlens for side in "qk"} | {
        f"max_length_{side}": max(lengths) for side in "qk"
    }
    output, _ = attend(layer, *inputs, None, sliding_window=window, **sides)
    return (output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs))


def _dense(inputs: list[Tensor], lengths: list[int], window: int | None) -> tuple[Tensor, ...]:
    """The same by a mask [T, T] and softmax, without any kernel."""
    query, key, value = (each.requires_grad_() for each in inputs)
    groups = query.size(1) // key.size(1)
    keys, values = (each.repeat_interleave(groups, 1) for each in (key, value))
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    at = torch.arange(len(of), device=query.device)
    ahead = at[:, None] - at
    mask = (of[:, None] == of) & (ahead >= 0) & (ahead < (window or len(of)))
    scores = query @ keys.mT * query.size(-1) ** -0.5
    output = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values).transpose(1, 2)
    return (output.detach(), *torch.autograd.grad(output.square().sum(), (query, key, value)))


def packed_model(context: Context) -> None:
    """A transformers model gives each sequence of a packed stream what it gets alone."""
    device, dtype = context.device, torch.bfloat16 if context.on_gpu else torch.float32
    # On a GPU "auto" is FlashAttention where it is installed, else torch's kernel.
    chosen = [attention_implementation("auto", device), attention_implementation("sdpa", device)]
    ids = torch.randint(1000, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(device)
    positions, cu_seqlens = position_ids_of(LENGTHS).to(device), cu_seqlens_of(LENGTHS).to(device)
    for kernel in dict.fromkeys(chosen):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(llama("tiny"), attn_implementation=kernel, dtype=dtype)
        model = model.to(device).eval()
        worst = 0.0
        with torch.no_grad():
            together = model(**packed_inputs(ids, positions, cu_seqlens)).logits[0]
            for part, length in zip(_parts(LENGTHS), LENGTHS, strict=True):
                ends = torch.tensor([0, length], dtype=torch.int32, device=device)
                alone = model(**packed_inputs(ids[part], positions[part], ends)).logits[0]
                worst = max(worst, relative_error(together[part], alone))
        context.record(f"{kernel}: difference of logits", worst)
        assert worst < (0.03 if context.on_gpu else 1e-5), (kernel, worst)


def _parts(lengths: list[int]) -> list[slice]:
    ends = cu_seqlens_of(lengths).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]
