"""Aggregation of a per-token loss to this micro-batch's share of the optimizer step's objective.

A share is already divided by a count of the whole step, so shares simply add up over micro-batches and ranks:
how samples were packed or distributed never changes the objective. Undoing the engine's average over
data-parallel ranks is done in the learner, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.registry import AGGREGATIONS
from rayrlhf.batch import sequence_ids_of


def masked(per_token: Tensor, loss_mask: Tensor) -> Tensor:
    """`per_token` [T] in fp32 where `loss_mask` [T] is set, 0 elsewhere.

    Selects instead of multiplying: NaN or inf outside the mask reaches neither the value nor the gradient.
    Raises `ValueError` when the shapes differ, which broadcasting would otherwise hide.
    """
    if per_token.shape != loss_mask.shape:
        raise ValueError(
            f"a per-token tensor has shape {tuple(per_token.shape)}, its loss_mask {tuple(loss_mask.shape)}: "
            "both must be [T]"
        )
    return torch.where(loss_mask > 0, per_token.float(), 0.0)


def sequence_sums(per_token: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Masked sum over each sequence, [S] in fp32."""
    sums = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float32, device=per_token.device)
    return sums.index_add(0, sequence_ids_of(cu_seqlens), masked(per_token, loss_mask))


def sequence_counts(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Masked tokens of each sequence, [S] in fp32."""
    return sequence_sums(torch.ones_like(loss_mask), loss_mask, cu_seqlens)


def loss_sequences(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How many sequences have a masked token (scalar): the local summand of `global_sequences`."""
    return (sequence_counts(loss_mask, cu_seqlens) > 0).sum()


def token_mean(
    per_token_loss: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    global_tokens: float,
    global_sequences: float,
    constant_length: float,
) -> Tensor:
    """Σ_t loss_t / global_tokens (DAPO, arXiv 2503.14476): every token of the step weighs the same."""
    return masked(per_token_loss, loss_mask).sum() / max(global_tokens, 1.0)


def sequence_mean(
    per_token_loss: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    global_tokens: float,
    global_sequences: float,
    constant_length: float,
) -> Tensor:
    """Σ_s mean_{t in s} loss_t / global_sequences (GRPO, arXiv 2402.03300): every sequence weighs the same.

    A sequence without masked tokens adds 0 and is not counted in `global_sequences` (see `loss_sequences`).
    """
    sums = sequence_sums(per_token_loss, loss_mask, cu_seqlens)
    means = sums / sequence_counts(loss_mask, cu_seqlens).clamp_min(1.0)
    return means.sum() / max(global_sequences, 1.0)


def sequence_sum_norm(
    per_token_loss: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    global_tokens: float,
    global_sequences: float,
    constant_length: float,
) -> Tensor:
    """Σ_s Σ_{t in s} loss_t / constant_length / global_sequences (Dr. GRPO, arXiv 2503.20783).

    The constant (the generation budget) replaces each sequence's own length, so long wrong answers are not
    favoured.
    """
    if constant_length <= 0:
        raise ValueError(f"constant_length={constant_length} must be > 0 (the longest response allowed)")
    return masked(per_token_loss, loss_mask).sum() / constant_length / max(global_sequences, 1.0)


def aggregate(
    name: str,
    per_token_loss: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    global_tokens: float,
    global_sequences: float,
    constant_length: float,
) -> Tensor:
    """This micro-batch's share (a scalar) of the objective called `name` in `registry.AGGREGATIONS`.

    `global_tokens` and `global_sequences` count masked tokens and sequences with a masked token over all
    micro-batches and ranks of the optimizer step; only `sequence_sum_norm` reads `constant_length`. A step
    without loss tokens (both 0) gives 0, still connected to the graph so that its backward pass runs. Raises
    `ValueError` for an unknown name.
    """
    if name not in AGGREGATIONS:
        raise ValueError(f"aggregation={name!r} is not one of {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[name].function(
        per_token_loss,
        loss_mask,
        cu_seqlens,
        global_tokens=global_tokens,
        global_sequences=global_sequences,
        constant_length=constant_length,
    )
