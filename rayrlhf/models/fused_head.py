"""Fused output projection, log-softmax and entropy: one autograd function over chunks of rows.

Plain autograd creates several [rows, V] tensors (logits, probabilities, their gradients) and a [V, H]
gradient per chunk. Here each chunk's logits are recomputed in the backward pass, except those of the last
one, which are still there, and converted in place to their gradient, in buffers shared by all chunks: one
block [chunk, V], a quarter of another, and one weight gradient to which every chunk is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rayrlhf.models.cpu_products import casts_factors

# Weight rows per matrix product of the gradient, if it must be cast to a wider dtype before it is added.
VOCABULARY_BLOCK = 8192
ROUNDED_BLOCK = 2048  # the same, if factors are cast to bf16
# Matrix products are efficient with many rows; the element-wise operations after them are as fast with few,
# and then need only this fraction of a second block.
SPARE_SHARE = 4


@dataclass(frozen=True)
class LogitScaling:
    """Maps the projection's output u to logits z = softcap · tanh(u / divisor / softcap) / temperature."""

    divisor: float = 1.0
    softcap: float | None = None  # None: no tanh
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """dz/du without softcap."""
        return 1.0 / (self.divisor * self.temperature)

    def apply_(self, projected: Tensor) -> Tensor:
        """z, overwriting u."""
        if self.softcap is not None:
            projected.mul_(1.0 / (self.divisor * self.softcap)).tanh_()
            return projected.mul_(self.softcap / self.temperature)
        return projected if self.slope == 1.0 else projected.mul_(self.slope)

    def gradient_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of u, overwriting that of z = `logits`."""
        if self.softcap is not None:
            tanh = logits * (self.temperature / self.softcap)
            grad.mul_(tanh.square_().neg_().add_(1.0))
        return grad if self.slope == 1.0 else grad.mul_(self.slope)


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
    The parameters themselves are saved, neither copies nor views: ZeRO-3 releases them after the forward pass
    and gathers them again before the backward pass.
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
        block, spare = _buffers(hidden, weight, chunk_tokens)
        shifts, numerators = spare.split(len(spare) // 2)
        logprobs, entropy, log_normaliser = (block.new_empty(hidden.size(0)) for _ in range(3))
        for rows in _chunks(hidden.size(0), chunk_tokens):
            projected = project(hidden[rows], weight, bias, out=block)
            for part, logits in _parts(projected, rows, numerators):
                scaling.apply_(logits)
                largest = logits.amax(-1)
                shifted = torch.sub(logits, largest[:, None], out=shifts[: len(logits)])
                weights = torch.exp(shifted, out=numerators[: len(logits)])  # of softmax
                total = weights.sum(-1)
                log_total = total.log()
                logprobs[part] = shifted.gather(-1, targets[part, None]).squeeze(-1) - log_total
                entropy[part] = log_total - weights.mul_(shifted).sum(-1) / total
                log_normaliser[part] = largest + log_total
        ctx.save_for_backward(hidden, weight, bias, targets, logprobs, entropy, log_normaliser)
        ctx.scaling, ctx.chunk_tokens = scaling, chunk_tokens
        # The last chunk's logits, for a backward pass that follows at once and needs these buffers again.
        ctx.kept = (block, spare) if any(ctx.needs_input_grad) else None
        ctx.set_materialize_grads(False)  # an unused entropy costs nothing
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logprobs, entropy, log_normaliser = ctx.saved_tensors
        grad_logprobs, grad_entropy = grad_outputs
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logprobs)
        kept, ctx.kept = ctx.kept, None  # a second backward pass finds them overwritten
        block, spare = kept or _buffers(hidden, weight, ctx.chunk_tokens)
        gradients = ProjectionGradients(ctx.needs_input_grad, hidden, weight, bias, block.dtype)
        for rows in reversed(_chunks(hidden.size(0), ctx.chunk_tokens)):
            is_kept, kept = kept is not None, None
            if is_kept:
                grad = block[: rows.stop - rows.start]
            else:
                grad = project(hidden[rows], weight, bias, out=block)
            for part, logits in _parts(grad, rows, spare):
                _to_gradient_(
                    logits if is_kept else ctx.scaling.apply_(logits),
                    targets[part],
                    logprobs[part],
                    entropy[part],
                    log_normaliser[part],
                    grad_logprobs[part],
                    None if grad_entropy is None else grad_entropy[part],
                    scaling=ctx.scaling,
                    spare=spare,
                )
            gradients.add(rows, grad)
        return (*gradients.result(), None, None, None)


class ProjectionGradients:
    """Gradients of a projection's three inputs, where needed, accumulated over chunks of rows."""

    def __init__(
        self,
        needed: Sequence[bool],  # for hidden, weight and bias
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        dtype: torch.dtype,  # of the sums
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        casts = casts_factors() and weight.dtype == torch.float32
        self.rounded = weight.to(torch.bfloat16) if casts else None
        self.of_hidden = torch.empty_like(hidden) if needed[0] else None
        self.of_weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self.of_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, rows: slice, grad: Tensor) -> None:
        """`grad` [n, V]: gradient of the projection's output at `rows`."""
        if self.of_bias is not None:
            self.of_bias += grad.sum(0)
        if self.rounded is not None:
            self._add_rounded(rows, grad, self.rounded)
            return
        grad = grad.to(self.weight.dtype)
        if self.of_hidden is not None:
            torch.mm(grad, self.weight, out=self.of_hidden[rows])
        if self.of_weight is not None:
            add_product_(self.of_weight, grad.T, self.hidden[rows])

    def _add_rounded(self, rows: slice, grad: Tensor, weight: Tensor) -> None:
        """Products of bf16 blocks that stay in the cache until their results are added in fp32."""
        hidden = self.hidden[rows].to(torch.bfloat16)
        of_hidden = None if self.of_hidden is None else self.of_hidden[rows].zero_()
        for block in slices(0, len(weight), ROUNDED_BLOCK):
            of_logits = grad[:, block].to(torch.bfloat16)
            if of_hidden is not None:
                of_hidden += of_logits @ weight[block]
            if self.of_weight is not None:
                self.of_weight[block] += of_logits.T @ hidden

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the dtypes of the inputs."""
        return (
            self.of_hidden,
            None if self.of_weight is None else self.of_weight.to(self.weight.dtype),
            None if self.of_bias is None else self.of_bias.to(self.weight.dtype),
        )


def _to_gradient_(
    logits: Tensor,  # [n, V], overwritten
    targets: Tensor,  # [n], like the following
    logprobs: Tensor,
    entropy: Tensor,
    log_normaliser: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    scaling: LogitScaling,
    spare: Tensor,  # [>= n, V]
) -> None:
    """Overwrite the logits with the gradient of the projection's output.

    g_logprob · (onehot − p) − g_entropy · p · (log p + entropy), times dz/du.
    """
    grad_logprobs = grad_logprobs * scaling.slope
    at_target = grad_logprobs
    if scaling.softcap is None and grad_entropy is None:
        logits.sub_(log_normaliser[:, None]).exp_().mul_(-grad_logprobs[:, None])
    else:
        probs = torch.sub(logits, log_normaliser[:, None], out=spare[: len(logits)]).exp_()
        if scaling.softcap is not None:
            # p · (1 − tanh²) as p · (1 − tanh) · (1 + tanh): avoids a third block.
            factor = scaling.temperature / scaling.softcap  # tanh = factor · z
            probs.addcmul_(probs, logits, value=-factor).addcmul_(probs, logits, value=factor)
            at_target = grad_logprobs * (1 - (factor * (logprobs + log_normaliser)) ** 2)
        if grad_entropy is None:
            torch.mul(probs, -grad_logprobs[:, None], out=logits)
        else:
            # log p + entropy = z + (entropy − logΣexp)
            grad_entropy = grad_entropy * scaling.slope
            constant = grad_logprobs + grad_entropy * (entropy - log_normaliser)
            logits.mul_(-grad_entropy[:, None]).sub_(constant[:, None]).mul_(probs)
    logits.scatter_add_(-1, targets[:, None], at_target[:, None])


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """hidden · weightᵀ + bias in the parameters' dtype, written to the first rows of `out` in its dtype."""
    out = out[: len(hidden)]
    if out.dtype != weight.dtype:
        return out.copy_(F.linear(hidden, weight, bias))
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, H] += left [V, n] · right [n, H], without a second [V, H] tensor if `total` is wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for part, rows in zip(total.split(VOCABULARY_BLOCK), left.split(VOCABULARY_BLOCK), strict=True):
        part += rows @ right


def _buffers(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """A block [chunk, V] and a fraction of one, shared by all chunks: new pages are slow on a CPU."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = min(chunk_tokens, hidden.size(0))
    block = hidden.new_empty(rows, weight.size(0), dtype=wide)
    return block, block.new_empty(2 * -(-rows // (2 * SPARE_SHARE)), weight.size(0))


def _parts(block: Tensor, rows: slice, spare: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The block of these rows in parts of at most the length of `spare`: (row slice, [n, V])."""
    return zip(slices(rows.start, rows.stop, len(spare)), block.split(len(spare)), strict=True)


def _chunks(num_rows: int, size: int) -> list[slice]:
    """Chunks of `size` rows; the first one has the remainder."""
    first = num_rows % size
    return [slice(0, first)] * (first > 0) + slices(first, num_rows, size)


def slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
