"""Matrix products of fp32 models on CPUs with bf16 units (AVX512-BF16, AMX).

Weights, gradients, optimizer states and activations stay fp32. oneDNN rounds the factors of each product to
bf16 (8 bits of mantissa) and sums in fp32; autocast, in contrast, also rounds what lies between the products
and casts the weights again for each. Chosen for `model.dtype: auto` alone, and only where products of the
model's own shapes are faster that way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # tokens of the measured products: about a micro-batch
REPEATS = 3
SMALLEST = 256  # hidden size; the products of a smaller model are not what its steps spend their time on
FASTER = 1.3  # less is lost in what else a step does, and not worth a deviation
_MKLDNN: Any = torch.backends.mkldnn


class Products(NamedTuple):
    """How products of fp32 matrices are computed."""

    bf16: bool
    speedup: float  # of bf16 over fp32, as measured; 0 without the units
    deviation: float  # root mean square of bf16 - fp32, in standard deviations of the product

    def __str__(self) -> str:
        if not self.bf16:
            return "matrix products in fp32"
        return (
            f"matrix products in bf16 with sums in fp32: {self.speedup:.1f} x as fast as fp32 on this CPU, "
            f"deviation {self.deviation:.2%} (model.dtype=float32 turns it off)"
        )


def use_fastest_products(model_config: Any, *, rows: int = ROWS) -> Products:
    """Measure once per process and shape, and set the process's precision to what is faster.

    Args:
        model_config: a transformers configuration; that of the text model is taken from it.
    """
    text = model_config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    products = measure_products(hidden, inner, rows)
    if products.bf16:
        _MKLDNN.matmul.fp32_precision = "bf16"
    return products


@lru_cache
def measure_products(hidden: int, inner: int, rows: int) -> Products:
    """The three products of a linear layer [inner, hidden] over [rows, hidden], both ways in turn."""
    if hidden < SMALLEST or not has_bf16_units():
        return Products(bf16=False, speedup=0.0, deviation=0.0)
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator) for shape in [(rows, hidden), (inner, hidden), (rows, inner)]
    )

    def layer() -> Tensor:
        gradient @ weight
        gradient.t() @ x
        return x @ weight.t()

    seconds: dict[str, list[float]] = {"ieee": [], "bf16": []}
    results: dict[str, Tensor] = {}
    for repeat in range(1 + REPEATS):
        for precision, times in seconds.items():
            with products_in(precision):
                results[precision], took = _timed(layer)
            if repeat > 0:
                times.append(took)
    exact = results["ieee"]
    deviation = float((results["bf16"] - exact).square().mean().sqrt() / exact.std())
    speedup = median(seconds["ieee"]) / median(seconds["bf16"])
    return Products(bf16=speedup >= FASTER, speedup=speedup, deviation=deviation)


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 numbers itself; elsewhere oneDNN would emulate it, or not do it."""
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Inside, products of fp32 matrices on the CPU are computed in `precision`: "ieee" (fp32) or "bf16"."""
    before = _MKLDNN.matmul.fp32_precision
    _MKLDNN.matmul.fp32_precision = precision
    try:
        yield
    finally:
        _MKLDNN.matmul.fp32_precision = before


def exactly(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`call(*inputs)` with all products in fp32, in its backward pass, too.

    For attention: its kernel multiplies blocks of few rows, which take four to nine times as long if each
    is rounded first (sequences of 32 to 128 tokens). Under activation checkpointing, `inputs` and the result
    stay in memory.
    """
    if _MKLDNN.matmul.fp32_precision != "bf16" or not all(each.device.type == "cpu" for each in inputs):
        return call(*inputs)
    return _Exactly.apply(call, *inputs)


class _Exactly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad[1:])
        with products_in("ieee"), torch.set_grad_enabled(wanted):
            ctx.inputs = [each.detach().requires_grad_(each.requires_grad) for each in inputs]
            ctx.output = call(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, output = ctx.inputs, ctx.output
        ctx.inputs = ctx.output = None  # the graph outlives this call
        with products_in("ieee"):
            grads = iter(torch.autograd.grad(output, [i for i in inputs if i.requires_grad], grad))
        return None, *(next(grads) if each.requires_grad else None for each in inputs)


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started
