"""The output projection, log-softmax and entropy as one autograd function over chunks of rows.

Plain autograd makes several [rows, V] tensors (logits, probabilities, their gradients) and a [V, H] gradient
per chunk. Here each chunk's logits are computed again in the backward pass and turned into their own gradient
in place, in buffers that all chunks share: at most two blocks of [chunk, V], and one gradient of the weight
that every chunk is added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows of the weight whose gradient is one matrix product, where that must be widened before it is added.
VOCABULARY_BLOCK = 8192


@dataclass(frozen=True)
class LogitScaling:
    """From the projection's output u to logits z = softcap · tanh(u / divisor / softcap) / temperature."""

    divisor: float = 1.0
    softcap: float | None = None  # None: no tanh
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """dz/du where nothing is capped."""
        return 1.0 / (self.divisor * self.temperature)

    def apply_(self, projected: Tensor) -> Tensor:
        """z, written over u."""
        if self.softcap is not None:
            projected.mul_(1.0 / (self.divisor * self.softcap)).tanh_()
            return projected.mul_(self.softcap / self.temperature)
        return projected if self.slope == 1.0 else projected.mul_(self.slope)

    def tanh(self, logits: Tensor) -> Tensor:
        """The capped logits as shares of the cap: tanh(u / divisor / softcap)."""
        assert self.softcap is not None
        return logits * (self.temperature / self.softcap)


class FusedLogprobs(torch.autograd.Function):
    """logprobs, entropy = f(hidden, weight, bias, targets, scaling, chunk_tokens).

    | argument | shape | |
    |---|---|---|
    | hidden | [N, H] | any floating dtype |
    | weight | [V, H] | the dtype of `hidden`: that of the matrix products |
    | bias | [V] or None | the same |
    | targets | [N] int64 | |
    | logprobs, entropy | [N] | fp32 (fp64 if `hidden` is): z_target − logΣexp(z) and −Σ p·log p |

    With p = softmax(z): d logprob / dz = onehot − p and d entropy / dz = −p · (log p + entropy).
    The very parameters are saved, neither copies nor views: ZeRO-3 empties them after the forward pass and
    fills them again before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: LogitScaling,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        logits_buffer, spare_buffer = _buffers(hidden, weight, chunk_tokens, count=2)
        logprobs, entropy, log_normaliser = (logits_buffer.new_empty(hidden.size(0)) for _ in range(3))
        for rows in _chunks(hidden.size(0), chunk_tokens):
            logits = scaling.apply_(_project(hidden[rows], weight, bias, out=logits_buffer))
            largest = logits.amax(-1)
            shifted = logits.sub_(largest[:, None])
            weights = torch.exp(shifted, out=spare_buffer[: len(shifted)])  # of the softmax, not normalised
            total = weights.sum(-1)
            log_total = total.log()
            logprobs[rows] = shifted.gather(-1, targets[rows, None]).squeeze(-1) - log_total
            entropy[rows] = log_total - weights.mul_(shifted).sum(-1) / total
            log_normaliser[rows] = largest + log_total
        ctx.save_for_backward(hidden, weight, bias, targets, logprobs, entropy, log_normaliser)
        ctx.scaling, ctx.chunk_tokens = scaling, chunk_tokens
        ctx.set_materialize_grads(False)  # an entropy that nobody uses costs nothing
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logprobs, entropy, log_normaliser = ctx.saved_tensors
        grad_logprobs, grad_entropy = grad_outputs
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logprobs)
        needs_spare = grad_entropy is not None or ctx.scaling.softcap is not None
        buffers = _buffers(hidden, weight, ctx.chunk_tokens, count=1 + needs_spare)
        wide = buffers[0].dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for rows in _chunks(hidden.size(0), ctx.chunk_tokens):
            grad = _grad_projected(
                ctx.scaling.apply_(_project(hidden[rows], weight, bias, out=buffers[0])),
                targets[rows],
                logprobs[rows],
                entropy[rows],
                log_normaliser[rows],
                grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                scaling=ctx.scaling,
                spare=buffers[-1],
            )
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product_(grad_weight, grad.T, hidden[rows])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _grad_projected(
    logits: Tensor,  # [n, V], overwritten by the result
    targets: Tensor,  # [n], as all that follow
    logprobs: Tensor,
    entropy: Tensor,
    log_normaliser: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    scaling: LogitScaling,
    spare: Tensor,  # [>= n, V]; may be the buffer of `logits` where neither entropy nor a cap needs another
) -> Tensor:
    """The gradient [n, V] of the projection's output, from the logits made of it.

    g_logprob · (onehot − p) − g_entropy · p · (log p + entropy), times dz/du.
    """
    grad_logprobs = grad_logprobs * scaling.slope
    at_target = grad_logprobs
    if scaling.softcap is not None:
        at_target = grad_logprobs * (1 - scaling.tanh(logprobs + log_normaliser) ** 2)
    if grad_entropy is None and scaling.softcap is None:
        grad = logits.sub_(log_normaliser[:, None]).exp_().mul_(-grad_logprobs[:, None])
    else:
        probs = torch.sub(logits, log_normaliser[:, None], out=spare[: len(logits)]).exp_()
        if scaling.softcap is not None:
            # p · (1 − tanh²) as p · (1 − tanh) · (1 + tanh): this needs no third block.
            factor = scaling.temperature / scaling.softcap
            probs.addcmul_(probs, logits, value=-factor).addcmul_(probs, logits, value=factor)
        if grad_entropy is None:
            grad = probs.mul_(-grad_logprobs[:, None])
        else:
            # log p + entropy = z + (entropy − log Σexp)
            grad_entropy = grad_entropy * scaling.slope
            constant = grad_logprobs + grad_entropy * (entropy - log_normaliser)
            grad = logits.mul_(-grad_entropy[:, None]).sub_(constant[:, None]).mul_(probs)
    return grad.scatter_add_(-1, targets[:, None], at_target[:, None])


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """hidden · weightᵀ + bias in the parameters' dtype, written to the first rows of `out` in its own."""
    out = out[: len(hidden)]
    if out.dtype != weight.dtype:
        return out.copy_(F.linear(hidden, weight, bias))
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, H] += left [V, n] · right [n, H], without a second [V, H] tensor if `total` is the wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for part, rows in zip(total.split(VOCABULARY_BLOCK), left.split(VOCABULARY_BLOCK), strict=True):
        part += rows @ right


def _buffers(hidden: Tensor, weight: Tensor, chunk_tokens: int, *, count: int) -> list[Tensor]:
    """`count` blocks [chunk, V] for every chunk in turn: on a CPU, touching fresh pages is slow."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = min(chunk_tokens, hidden.size(0))
    return [hidden.new_empty(rows, weight.size(0), dtype=wide) for _ in range(count)]


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
