"""Load-balancing loss of mixture-of-experts routers (Switch Transformers, arXiv 2101.03961, eq. 4 to 6).

Over the N routed rows of an optimizer step (every token once per mixture-of-experts layer), with f_e the
number of rows sent to expert e per row and P_e the mean routing probability of e:

    loss = E · Σ_e f_e · P_e

It is K, the experts per token, if all are used alike. The statistics are over the whole step, all ranks and
micro-batches (arXiv 2501.11873), so that the loss depends on none of them; f has no gradient. transformers'
`load_balancing_loss_func` is the same for one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_counts(chosen: Tensor, num_experts: int) -> Tensor:
    """Rows [E] (float64) sent to each expert by the choices [N, K]."""
    ones = torch.ones(chosen.numel(), dtype=torch.float64, device=chosen.device)
    return ones.new_zeros(num_experts).scatter_add(0, chosen.flatten(), ones)


def balance_loss(scores: Tensor, counts: Tensor, rows: float) -> Tensor:
    """A micro-batch's share of the loss; shares add up over layers, micro-batches and ranks.

    Args:
        scores: routing probabilities [n, E] of some of the rows.
        counts: rows [E] sent to each expert, of all `rows`.
        rows: N.
    """
    frequency = (counts / rows).to(scores)
    return scores.size(-1) * (scores.sum(0) / rows * frequency).sum()
