"""Attention over packed sequences: FlashAttention's varlen kernel if the package is installed, torch's own
(`torch.nn.attention.varlen`) on other GPUs, else SDPA per sequence.

All take the same arguments, so a model is called the same way on every device. A packed stream must never
use a plain dense mask: transformers derives a block-diagonal mask from restarting `position_ids` only under
conditions that are easy to miss, and otherwise silently lets sequences attend to each other.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward

from rayrlhf.models.cpu_products import exactly

if TYPE_CHECKING:
    from rayrlhf.models.parallel import Share
    from rayrlhf.prefixes import SharedPrefixes

VARLEN_SDPA = "varlen_sdpa"
VARLEN = "varlen"  # torch's kernel where it computes what the layer needs, else as VARLEN_SDPA
LARGEST_HEAD = 256  # of that kernel
ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 goes by the shapes
MOST_KEYS_PER_ROW = 2  # kept for the backward pass; a key and value take a few percent of a row's activations


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
    """Causal SDPA per sequence, without a [T, T] mask; returns [1, T, heads, head_dim].

    With a `sequence_share` (rayrlhf.models.parallel), for this rank's tokens only, or for the rows of shared
    prefixes and of what follows them.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        raise ValueError("varlen_sdpa needs cu_seq_lens_q: call the model through packed_inputs()")
    if kwargs.get("s_aux") is not None:
        raise ValueError("this model's attention has sinks, which varlen_sdpa does not support")
    seen = _seen.get()
    if seen is not None:
        seen.add(module)
    options: dict[str, Any] = {
        "scale": scaling,
        "dropout_p": dropout if module.training else 0.0,
        "enable_gqa": getattr(module, "num_key_value_groups", 1) > 1,
        "softcap": softcap,
    }
    reach = Reach(sliding_window, chunk_size(module))
    share: Share | None = kwargs.get("sequence_share")
    if share is None:
        attend = partial(_of_sequences, lengths=cu_seqlens.diff().tolist())
    else:
        share.num_attended += 1
        attend = partial(_of_share, share=share)
        if share.prefixes is not None:
            attend = partial(
                _keeping_few_keys, share.prefixes, partial(_of_prefixes, prefixes=share.prefixes)
            )
    outputs = exactly(partial(attend, reach=reach, options=options), query, key, value)
    return outputs.transpose(1, 2).contiguous(), None


def _of_sequences(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: list[int], reach: Reach, options: dict[str, Any]
) -> Tensor:
    parts = zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, reach, options) for q, k, v in parts], 2)


def _of_share(
    query: Tensor, key: Tensor, value: Tensor, *, share: Share, reach: Reach, options: dict[str, Any]
) -> Tensor:
    """Each run of held tokens attends to its sequence, from the sequence's start to itself."""
    keys, values = share.gathered(key, value)
    outputs = []
    for q, piece in zip(query.split([p.stop - p.first for p in share.pieces], 2), share.pieces, strict=True):
        k, v = keys[:, :, piece.start : piece.stop], values[:, :, piece.start : piece.stop]
        outputs.append(_attend(q, k, v, reach, options))
    return torch.cat(outputs, 2)


def _of_prefixes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prefixes: SharedPrefixes,
    reach: Reach,
    options: dict[str, Any],
) -> Tensor:
    """Each segment attends to the prefix that it continues and to itself."""
    lengths = list(prefixes.lengths)
    queries, keys, values = (each.split(lengths, 2) for each in (query, key, value))
    outputs = []
    for index, prefix in enumerate(prefixes.prefix_of):
        k, v = keys[index], values[index]
        if prefix >= 0:
            k, v = torch.cat([keys[prefix], k], 2), torch.cat([values[prefix], v], 2)
        outputs.append(_attend(queries[index], k, v, reach, options))
    return torch.cat(outputs, 2)


def _keeping_few_keys(
    prefixes: SharedPrefixes, attend: Callable[..., Any], *inputs: Tensor, **options: Any
) -> Any:
    """`attend`, which copies each prefix's keys and values for every sequence. For the backward pass
    the copies are kept only if they are few: micro-batches are sized by their rows.
    """
    if len(prefixes.key_rows) <= MOST_KEYS_PER_ROW * prefixes.num_rows or not torch.is_grad_enabled():
        return attend(*inputs, **options)
    return checkpoint(attend, *inputs, use_reentrant=False, **options)


def _attend(query: Tensor, key: Tensor, value: Tensor, reach: Reach, options: dict[str, Any]) -> Tensor:
    """The queries, which are the last tokens of a sequence, attend to its tokens within their reach."""
    stop, outputs = key.size(2), []
    first = stop - query.size(2)
    for block in reach.blocks(first, stop):
        q = query[:, :, block.first - first : block.stop - first]
        k, v = key[:, :, block.start : block.stop], value[:, :, block.start : block.stop]
        outputs.append(_attend_block(q, k, v, reach.window, options))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, window: int | None, options: dict[str, Any]) -> Tensor:
    options = dict(options)
    softcap = options.pop("softcap")
    is_narrow = window is not None and k.size(2) > window
    if softcap is not None:
        return _capped(q, k, v, _band(q, k, window if is_narrow else None), softcap, **options)
    if is_narrow:
        return scaled_dot_product_attention(q, k, v, attn_mask=_band(q, k, window), **options)
    if q.size(2) == k.size(2):
        return scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    mask: Any = causal_lower_right(q.size(2), k.size(2))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _band(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Mask of the keys that each query attends to, [queries, keys]; the last query is at the last key."""
    ahead = k.size(2) - q.size(2)
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(ahead)
    return mask if window is None else mask.triu(ahead - window + 1)


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    softcap: float,
    *,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
) -> Tensor:
    """Attention with scores softcap · tanh(score / softcap), which SDPA's kernels lack (Gemma 2)."""
    if enable_gqa:
        k, v = (each.repeat_interleave(q.size(1) // k.size(1), 1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.size(-1) ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.dropout(weights, dropout_p, True) @ v


class Block(NamedTuple):
    """A run of queries, and the first key within reach of the first of them."""

    first: int
    stop: int
    start: int


def varlen(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`varlen_sdpa` by one call of torch's kernel for all sequences; also of shared prefixes."""
    share: Share | None = kwargs.get("sequence_share")
    if kwargs.get("s_aux") is not None or not _kernel_computes(module, query, share, kwargs):
        return varlen_sdpa(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    ends, key_ends = (kwargs[f"cu_seq_lens_{side}"].to(torch.int32) for side in "qk")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if share is not None and share.prefixes is not None:
            key, value = (each[:, :, share.prefixes.key_rows] for each in (key, value))
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # [tokens, heads, head_dim]
        grouped: dict[str, Any] = {"enable_gqa": q.size(1) != k.size(1)} if ASKS_FOR_GQA else {}
        output: Any = varlen_attn(  # a tuple, if more were asked for
            q,
            k,
            v,
            ends,
            key_ends,
            kwargs["max_length_q"],
            kwargs["max_length_k"],
            scale=kwargs.get("scaling"),
            window_size=(-1 if window is None else window - 1, 0),
            **grouped,
        )
        return output[None]

    if share is None:
        return attend(query, key, value), None
    share.num_attended += 1
    assert share.prefixes is not None
    return _keeping_few_keys(share.prefixes, attend, query, key, value), None


def _kernel_computes(module: nn.Module, query: Tensor, share: Share | None, options: dict[str, Any]) -> bool:
    """Whether torch's varlen kernel has all that this call needs."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.size(-1) <= LARGEST_HEAD
        and query.size(-1) % 8 == 0
        and options.get("softcap") is None
        and not (module.training and options.get("dropout"))
        and chunk_size(module) is None
        and (share is None or share.prefixes is not None)
    )


class Reach(NamedTuple):
    """How far back a layer's tokens attend: `window` tokens with themselves, or to the start of the chunk."""

    window: int | None = None
    chunk: int | None = None

    def blocks(self, first: int, stop: int) -> list[Block]:
        """The queries at `first` .. `stop` - 1 of a sequence, split into blocks that need few keys."""
        size = self.chunk or self.window
        if size is None or stop <= size:
            return [Block(first, stop, 0)]
        edges = [first, *range((first // size + 1) * size, stop, size), stop]
        if self.chunk is not None:
            return [Block(a, b, a // size * size) for a, b in pairwise(edges)]
        return [Block(a, b, max(0, a - size + 1)) for a, b in pairwise(edges)]


def chunk_size(module: Any) -> int | None:
    """Chunk size of a layer with chunked attention (Llama 4), which transformers implements by its mask."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or layer is None or kinds[layer] != "chunked_attention":
        return None
    return config.attention_chunk_size  # pyright: ignore[reportOptionalMemberAccess]


def has_chunks(config: Any) -> bool:
    """Whether a model with this config has layers with chunked attention."""
    return "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def flash_with_prefixes(
    module: nn.Module,
    query: Tensor,  # [1, heads, U, head_dim]
    key: Tensor,  # [1, kv_heads, U, head_dim]
    value: Tensor,  # [1, kv_heads, U, head_dim]
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' FlashAttention, with the keys and values of shared prefixes for each segment that
    continues one: its varlen kernel aligns the last query of a segment with the last key.
    """
    share: Share | None = kwargs.get("sequence_share")
    if share is not None and share.prefixes is not None:
        share.num_attended += 1
        key_rows = share.prefixes.key_rows

        def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
            keys, values = key[:, :, key_rows], value[:, :, key_rows]
            return flash_attention_forward(module, query, keys, values, attention_mask, **kwargs)

        return _keeping_few_keys(share.prefixes, attend, query, key, value)
    return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def attending_layers() -> Iterator[set[nn.Module]]:
    """Records the modules that call `varlen_sdpa` inside the context."""
    seen: set[nn.Module] = set()
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


_seen: ContextVar[set[nn.Module] | None] = ContextVar("seen", default=None)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The sequence boundaries are passed as cu_seqlens; no mask may be built in addition."""


KERNELS: dict[str, Callable[..., Any]] = {
    VARLEN_SDPA: varlen_sdpa,
    VARLEN: varlen,
    # Under transformers' own name, by which it loads the kernel; without shared prefixes it is transformers'.
    "flash_attention_2": flash_with_prefixes,
}
for _name, _kernel in KERNELS.items():
    AttentionInterface.register(_name, _kernel)
AttentionMaskInterface.register(VARLEN_SDPA, _no_mask)
AttentionMaskInterface.register(VARLEN, _no_mask)


def attention_implementation(requested: str, device: torch.device) -> str:
    """transformers' name for `model.attention` on this device."""
    has_flash = device.type == "cuda" and _flash_attention_is_installed()
    if requested == "flash_attention_2" and not has_flash:
        raise ValueError(
            "model.attention=flash_attention_2 needs a CUDA GPU and the flash-attn package; "
            "use model.attention=auto"
        )
    if requested == "sdpa" or device.type != "cuda":
        return VARLEN_SDPA
    return "flash_attention_2" if has_flash else VARLEN


def _flash_attention_is_installed() -> bool:
    """FlashAttention 2 and 3 have this module; FlashAttention 4 is another package of the same name."""
    try:
        return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
    except ModuleNotFoundError:
        return False


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


def prefix_inputs(input_ids: Tensor, position_ids: Tensor, share: Share) -> dict[str, Any]:
    """Arguments for a transformers decoder over the rows of a stream with shared prefixes (`[T]`, `[T]`)."""
    assert share.prefixes is not None
    return packed_inputs(share.take(input_ids), share.take(position_ids), share.prefixes.cu_seqlens) | {
        "cu_seq_lens_k": share.prefixes.cu_seqlens_k,
        "max_length_k": share.prefixes.longest_keys,
        "sequence_share": share,
    }
