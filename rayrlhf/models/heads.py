"""Heads over packed streams: the critic's value per token, the reward model's score per sequence, and the
process reward model's logits per step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayrlhf.models.parallel import PackedModel
from rayrlhf.models.vision import SequenceImages
from rayrlhf.prefixes import SharedPrefixes


class ScalarHead(nn.Module):
    """A linear head with fp32 output, whatever the dtype of the weights.

    In bfloat16 the spacing of values near 5 is 1/32, and a difference of two of them, as in GAE, is mostly
    rounding. It owns the parameters of the layer that it is made from, under the same names.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # [labels, H]
        self.bias = linear.bias  # [labels] or None

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, labels] of `hidden` [N, H]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)


class ValueModel(PackedModel):
    """A decoder with one number per token: the value of the state *before* that token.

    `values[t]` is computed from the hidden state of token t-1, like `logprobs[t]` (see rayrlhf.batch); it
    is 0 at the first token of every sequence, which is never a policy token.
    """

    def __init__(self, decoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = ScalarHead(head)

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        images: SequenceImages = (),
        prefixes: SharedPrefixes | None = None,
    ) -> Tensor:
        """Values [T] in fp32."""
        hidden, share = self.decode(self.decoder, input_ids, position_ids, cu_seqlens, images, prefixes)
        after = share.placed(self.head(hidden).squeeze(-1))  # [T], of the state after each token
        return torch.where(position_ids > 0, after.roll(1), 0.0)


class ScoreModel(PackedModel):
    """A sequence classifier with one label, evaluated at each sequence's last token (decoder checkpoints)."""

    def __init__(self, decoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = ScalarHead(head)

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        prefixes: SharedPrefixes | None = None,
    ) -> Tensor:
        """Scores [S] in fp32."""
        hidden, share = self.decode(self.decoder, input_ids, position_ids, cu_seqlens, prefixes=prefixes)
        last = cu_seqlens[1:].long() - 1
        scores = self.head(hidden[share.rows_of(last)]).squeeze(-1)
        return share.summed(scores * share.holds()[last])


class StepModel(PackedModel):
    """A token classifier with the labels (bad, good), evaluated at the tokens that end a step (PRM)."""

    def __init__(self, decoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = ScalarHead(head)

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        loss_mask: Tensor,  # [T]
        prefixes: SharedPrefixes | None = None,
    ) -> Tensor:
        """Logits [N, 2] in fp32 at the N tokens in the mask, in order.

        If N is 0, the head still runs on one token, which is then sliced off: under ZeRO-3 every rank must
        run it, and the sum of no logits still has a (zero) gradient for every parameter.
        """
        hidden, share = self.decode(self.decoder, input_ids, position_ids, cu_seqlens, prefixes=prefixes)
        where = (loss_mask > 0).nonzero().squeeze(-1)
        count = where.numel()
        rows = hidden[share.rows_of(where)] if count else hidden[:1]
        logits = self.head(rows)[:count]
        return share.summed(logits * share.holds()[where, None])
