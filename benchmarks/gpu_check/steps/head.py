"""The fused head against float64 at a vocabulary of 128 thousand, and its speed by chunk size."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_check.measure import relative_error, seconds_of
from benchmarks.gpu_check.step import GIB, Context
from rayrlhf.models.fused_head import FusedLogprobs, LogitScaling

VOCABULARY = 128_256
TEMPERATURE = 0.7
CHUNKS = (256, 2048)
# Bounds of the largest error of a log-probability, and of the relative error of a gradient. Logits of bf16
# weights are rounded to 8 bits before they are widened.
BOUNDS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.1, 0.03)}


def run(context: Context) -> None:
    rows, hidden_size = (512, 4096) if context.on_gpu else (48, 64)
    for dtype, (logprob_bound, gradient_bound) in BOUNDS.items():
        inputs = _inputs(context, rows, hidden_size, dtype)
        wanted = _exact(*inputs)
        for chunk in CHUNKS if context.on_gpu else (20,):
            got = _fused(*inputs, chunk)
            name = f"{str(dtype).removeprefix('torch.')}, chunks of {chunk}"
            worst = max(float((got[i].double() - wanted[i]).abs().max()) for i in (0, 1))
            context.record(f"{name}: largest error of log-probability and entropy", worst)
            gradient = max(relative_error(got[i], wanted[i]) for i in (2, 3))
            context.record(f"{name}: relative error of gradients", gradient)
            assert worst < logprob_bound and gradient < gradient_bound, (name, worst, gradient)
    _record_speed(context, hidden_size)


def _record_speed(context: Context, hidden_size: int) -> None:
    rows = 8192 if context.on_gpu else 64
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    inputs = _inputs(context, rows, hidden_size, dtype)
    for chunk in CHUNKS if context.on_gpu else (32,):
        if context.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(lambda chunk=chunk: _fused(*inputs, chunk), context.device, repeats=3)
        context.record(f"{rows} rows, chunks of {chunk}: forward and backward", 1e3 * seconds, "ms")
        if context.on_gpu:
            peak = torch.cuda.max_memory_allocated() / GIB
            context.record(f"{rows} rows, chunks of {chunk}: peak", peak, "GiB")


def _inputs(
    context: Context, rows: int, hidden_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, H], weight [V, H], targets [rows]; logits of about normal size."""
    generator = torch.Generator(context.device).manual_seed(0)
    options = {"generator": generator, "device": context.device}
    hidden = torch.randn(rows, hidden_size, **options).to(dtype)
    weight = (torch.randn(VOCABULARY, hidden_size, **options) * hidden_size**-0.5).to(dtype)
    targets = torch.randint(VOCABULARY, (rows,), **options)
    return hidden, weight, targets


def _fused(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, and the gradients of hidden and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    scaling = LogitScaling(temperature=TEMPERATURE)
    logprobs, entropy = FusedLogprobs.apply(hidden, weight, None, targets, scaling, chunk)
    gradients = torch.autograd.grad(_objective(logprobs, entropy), (hidden, weight))
    return (logprobs.detach(), entropy.detach(), *gradients)


def _exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The same by plain autograd on whole logits in float64."""
    wide = [each.double().requires_grad_() for each in (hidden, weight)]
    log_probs = (wide[0] @ wide[1].T / TEMPERATURE).log_softmax(-1)
    logprobs = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    gradients = torch.autograd.grad(_objective(logprobs, entropy), wide)
    return (logprobs.detach(), entropy.detach(), *gradients)


def _objective(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """Rows count differently, so that none hides another."""
    weights = torch.linspace(-1.0, 2.0, len(logprobs), device=logprobs.device, dtype=logprobs.dtype)
    return (weights * logprobs).sum() + 0.01 * (weights.flip(0) * entropy).sum()
