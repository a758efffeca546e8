"""Log-probabilities of given tokens without materialising a [tokens, vocab] tensor.

The language-model head runs only where the loss mask is set, in chunks of rows, in fp32 whatever the model's
dtype (rayrlhf.models.fused_head).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rayrlhf.models.experts import Replay
from rayrlhf.models.fused_head import FusedLogprobs, LogitScaling
from rayrlhf.models.parallel import PackedModel
from rayrlhf.models.streams import decoder_of
from rayrlhf.models.vision import SequenceImages
from rayrlhf.prefixes import SharedPrefixes


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [T] fp32; 0 where the loss mask is 0
    entropy: Tensor  # [T] fp32; 0 where the loss mask is 0


def logit_scaling(config: PreTrainedConfig) -> LogitScaling:
    """The model's scaling of its projection's output."""
    text = config.get_text_config()

    def factor(name: str) -> float:
        return getattr(text, name, None) or 1.0

    # Granite and MiniCPM divide by logits_scaling, HyperCLOVA X multiplies; Inkling divides earlier.
    scaling = factor("logits_scaling") ** (-1.0 if text.model_type == "hyperclovax" else 1.0)
    divisor = scaling * factor("logits_mup_width_multiplier")
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    # Cohere and Falcon-H1 multiply.
    return LogitScaling(divisor / (factor("logit_scale") * factor("lm_head_multiplier")), softcap)


class OutputHead(nn.Module):
    """The model's output projection, for a forward pass over chunks of rows.

    It owns the projection's parameters (tied or not) instead of calling the projection, so that ZeRO-3
    gathers them once per forward and once per backward on every rank, however many chunks a rank has.
    """

    def __init__(self, projection: nn.Linear, *, chunk_tokens: int, scaling: LogitScaling) -> None:
        super().__init__()
        self.weight = projection.weight  # [V, H]
        self.bias = projection.bias
        self.vocabulary_size = projection.out_features  # the weight has no rows while ZeRO-3 partitions it
        self.chunk_tokens = chunk_tokens
        self.scaling = scaling


class LogprobHead(OutputHead):
    """The output projection, fused with log-softmax and gather."""

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N] of `targets` [N], each after its row of `hidden` [N, H]."""
        scaling = replace(self.scaling, temperature=temperature)
        return FusedLogprobs.apply(hidden, self.weight, self.bias, targets, scaling, self.chunk_tokens)


class PolicyModel(PackedModel):
    """A causal language model that returns log-probabilities of its input tokens."""

    def __init__(self, causal_lm: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        projection: Any = causal_lm.get_output_embeddings()
        self.head = LogprobHead(
            projection, chunk_tokens=chunk_tokens, scaling=logit_scaling(causal_lm.config)
        )
        self.replay: Replay | None = None  # with router replay

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        loss_mask: Tensor,  # [T]
        temperature: float = 1.0,
        *,
        routed_experts: Tensor | None = None,  # [T, L, K]; -1: the router chooses
        images: SequenceImages = (),  # [S], or empty
        prefixes: SharedPrefixes | None = None,
    ) -> TokenLogprobs:
        """Log-probability and entropy of each token in the mask, at `temperature`, given those before it."""
        if self.replay is not None:
            own = self.share_of(cu_seqlens, input_ids.numel(), prefixes)
            self.replay.set(None if routed_experts is None else own.take(routed_experts))
        decoder = self.causal_lm.base_model if self.vision is not None else decoder_of(self.causal_lm)
        hidden, share = self.decode(decoder, input_ids, position_ids, cu_seqlens, images, prefixes)
        where, weight = loss_tokens(position_ids, loss_mask * share.holds().roll(1))
        rows = hidden[share.rows_of(where - 1)]
        logprobs, entropy = self.head(rows, input_ids[where], temperature)
        empty = torch.zeros(input_ids.numel(), device=hidden.device)
        return TokenLogprobs(
            share.summed(empty.index_put((where,), logprobs * weight)),
            share.summed(empty.index_put((where,), entropy * weight)),
        )


def loss_tokens(position_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the loss tokens, on which the head runs, and their weights; both [N].

    A batch without loss tokens still runs the head, on one token with weight 0: under ZeRO-3 every rank must.
    """
    in_loss = (loss_mask > 0) & (position_ids > 0)
    where = in_loss.nonzero().squeeze(-1)
    if where.numel() == 0:
        where = torch.ones(1, dtype=torch.long, device=where.device)
    return where, in_loss[where].float()
