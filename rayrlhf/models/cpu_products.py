"""Matrix products of fp32 models on CPUs with bf16 units (AVX512-BF16, AMX).

Weights, gradients, optimizer states and activations stay fp32. There are two ways to round the factors of a
product to bf16 (8 bits of mantissa) and sum in fp32. With AMX, oneDNN does it inside an fp32 product, and
does not round the result; with AVX512-BF16 alone it stays in fp32. There, linear layers cast their factors,
multiply bf16 tensors, and cast the result back, which rounds the result, too (1.8 x fp32 on Zen 4). Autocast,
in contrast, also rounds what lies between the products. Chosen for `model.dtype: auto` alone, and only where
products of the model's own shapes are faster that way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS = 1024  # tokens of the measured products: about a micro-batch
REPEATS = 5
SMALLEST = 256  # hidden size; the products of a smaller model are not what its steps spend their time on
NARROWEST = 64  # rows or columns of a weight whose product is worth casts
FASTER = 1.3  # less is lost in what else a step does, and not worth a deviation
LEAST_DEVIATION = 1e-4  # of products with rounded factors; less is fp32
_MKLDNN: Any = torch.backends.mkldnn
_casts = False  # of the process, as torch's precision is


class Products(NamedTuple):
    """How products of fp32 matrices are computed."""

    bf16: bool
    casts: bool  # whether linear layers cast their factors and results; otherwise oneDNN rounds factors
    speedup: float  # of bf16 over fp32, as measured; 0 without the units
    deviation: float  # root mean square of bf16 - fp32, in standard deviations of the product

    def __str__(self) -> str:
        if not self.bf16:
            return "matrix products in fp32"
        way = ", by casts" if self.casts else ""
        return (
            f"matrix products in bf16 with sums in fp32{way}: "
            f"{self.speedup:.1f} x as fast as fp32 on this CPU, deviation {self.deviation:.2%} "
            "(model.dtype=float32 turns it off)"
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
        _set_process("bf16", products.casts)
    return products


@lru_cache
def measure_products(hidden: int, inner: int, rows: int) -> Products:
    """The three products of a linear layer [inner, hidden] over [rows, hidden], both ways in turn."""
    if hidden < SMALLEST or not has_bf16_units():
        return Products(bf16=False, casts=False, speedup=0.0, deviation=0.0)
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator) for shape in [(rows, hidden), (inner, hidden), (rows, inner)]
    )

    def layer() -> Tensor:
        _, _, y = gradient @ weight, gradient.t() @ x, x @ weight.t()
        return y

    def layer_with_casts() -> Tensor:
        x_rounded, weight_rounded, gradient_rounded = (each.bfloat16() for each in (x, weight, gradient))
        (gradient_rounded @ weight.bfloat16()).float()
        (gradient_rounded.t() @ x_rounded).float()
        return (x_rounded @ weight_rounded.t()).float()

    with products_in("ieee"):
        exact = layer()
    with products_in("bf16"):
        rounded = layer()
    casts = _deviation(rounded, exact) < LEAST_DEVIATION
    precision, call = ("ieee", layer_with_casts) if casts else ("bf16", layer)
    seconds, exact_seconds = [], []
    for _ in range(REPEATS):
        with products_in("ieee"):
            exact_seconds.append(_timed(layer)[1])
        with products_in(precision):
            rounded, took = _timed(call)
            seconds.append(took)
    # The fastest of each: an engine that starts meanwhile delays some.
    speedup = min(exact_seconds) / min(seconds)
    chosen = speedup >= FASTER
    return Products(chosen, chosen and casts, speedup, _deviation(rounded, exact))


def _deviation(product: Tensor, exact: Tensor) -> float:
    return float((product - exact).square().mean().sqrt() / exact.std())


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 numbers itself; elsewhere oneDNN would emulate it, or not do it."""
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@contextmanager
def products_in(precision: str, *, casts: bool = False) -> Iterator[None]:
    """Inside, products of fp32 matrices on the CPU are computed in `precision`: "ieee" (fp32) or "bf16", and
    with `casts` those of `CastLinear` and of the output head's gradients by casts.
    """
    before = _MKLDNN.matmul.fp32_precision, _casts
    _set_process(precision, casts)
    try:
        yield
    finally:
        _set_process(*before)


def _set_process(precision: str, casts: bool) -> None:
    global _casts
    _MKLDNN.matmul.fp32_precision, _casts = precision, casts


def casts_factors() -> bool:
    """Whether layers cast the factors of their fp32 products to bf16 here and now."""
    return _casts


class CastLinear(nn.Linear):
    """A linear layer of fp32 weights and activations that multiplies in bf16 where factors are cast."""

    def forward(self, input: Tensor) -> Tensor:
        if self.casts(input):
            return CastProduct.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)

    def casts(self, input: Tensor) -> bool:
        return input.dtype == torch.float32 and casts_factors()


def cast_product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · matrix [in, out] + bias in the dtype of x, without gradients; factors and product are
    rounded to bf16.
    """
    y = (x.to(torch.bfloat16) @ matrix.to(torch.bfloat16)).to(x.dtype)
    return y if bias is None else y.add_(bias)


class CastProduct(torch.autograd.Function):
    """y [..., out] = x [..., in] · weightᵀ + bias in fp32, with factors and products rounded to bf16.

    The rounded x is saved, half the size of x, and the parameter itself: ZeRO-3 releases it in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounded = x.to(torch.bfloat16)
        ctx.save_for_backward(rounded if ctx.needs_input_grad[1] else None, weight)
        y = (rounded @ weight.t().to(torch.bfloat16)).to(x.dtype)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rounded, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        factor = grad.to(torch.bfloat16)
        return (
            (factor @ weight.to(torch.bfloat16)).to(grad.dtype) if of_x else None,
            (factor.flatten(0, -2).t() @ rounded.flatten(0, -2)).to(grad.dtype) if of_weight else None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
        )


def cast_linear_layers(model: nn.Module) -> None:
    """Let the linear layers of `model` be `CastLinear`, except narrow ones (scores, gates)."""
    for module in model.modules():
        if type(module) is nn.Linear and min(module.weight.shape) >= NARROWEST:
            module.__class__ = CastLinear


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
