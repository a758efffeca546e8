"""Attention over packed sequences: FlashAttention's varlen kernel where there is one, else SDPA per sequence.

Both take the same arguments, so a model is called the same way on every device. A packed stream must never go
through a plain dense mask: transformers derives a block-diagonal mask from restarting `position_ids` only
under conditions that are easy to miss, and otherwise lets sequences attend to each other without a word.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

if TYPE_CHECKING:
    from rayrlhf.models.parallel import Share

VARLEN_SDPA = "varlen_sdpa"


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal SDPA of each sequence by itself, without a [T, T] mask; [1, T, heads, head_dim].

    With a `sequence_share` (rayrlhf.models.parallel), of this rank's tokens only.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        raise ValueError("varlen_sdpa needs cu_seq_lens_q: call the model through packed_inputs()")
    if softcap is not None:
        raise ValueError(
            "this model caps its attention scores, which SDPA cannot: use flash_attention_2 on a GPU"
        )
    if sliding_window is not None and int(kwargs["max_length_q"]) > sliding_window:
        raise ValueError(
            f"a sequence of {int(kwargs['max_length_q'])} tokens exceeds the model's sliding window of "
            f"{sliding_window}: shorten it or use flash_attention_2 on a GPU"
        )
    options: dict[str, Any] = {
        "scale": scaling,
        "dropout_p": dropout if module.training else 0.0,
        "enable_gqa": getattr(module, "num_key_value_groups", 1) > 1,
    }
    share: Share | None = kwargs.get("sequence_share")
    if share is None:
        lengths = cu_seqlens.diff().tolist()
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        outputs = [scaled_dot_product_attention(q, k, v, is_causal=True, **options) for q, k, v in parts]
    else:
        outputs = _of_share(query, key, value, share, options)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _of_share(
    query: Tensor, key: Tensor, value: Tensor, share: Share, options: dict[str, Any]
) -> list[Tensor]:
    """Each run of held tokens attends to its sequence, from where that starts to itself."""
    share.num_attended += 1
    keys, values = share.gathered(key, value)
    outputs = []
    for q, piece in zip(query.split([p.stop - p.first for p in share.pieces], 2), share.pieces, strict=True):
        k, v = keys[:, :, piece.start : piece.stop], values[:, :, piece.start : piece.stop]
        causal: dict[str, Any] = {"is_causal": True}
        if piece.first > piece.start:
            causal = {"attn_mask": causal_lower_right(q.size(2), k.size(2))}
        outputs.append(scaled_dot_product_attention(q, k, v, **causal, **options))
    return outputs


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The sequence boundaries travel as cu_seqlens; nothing may build a mask beside them."""


AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
AttentionMaskInterface.register(VARLEN_SDPA, _no_mask)


def attention_implementation(requested: str, device: torch.device) -> str:
    """The name transformers knows for `model.attention` on this device."""
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if requested == "flash_attention_2" and not has_flash:
        raise ValueError(
            "model.attention=flash_attention_2 needs a CUDA GPU and the flash-attn package; "
            "use model.attention=auto"
        )
    return "flash_attention_2" if has_flash and requested != "sdpa" else VARLEN_SDPA


def packed_inputs(input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
    """Arguments for a transformers decoder over one packed stream (`[T]`, `[T]`, `[S+1]`)."""
    longest = int(cu_seqlens.diff().max())
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }
