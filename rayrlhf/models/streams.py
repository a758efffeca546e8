"""Streams of a decoder: sequences packed into one stream, or one sequence per stream.

A model is correct with packed streams only if no layer carries state from one sequence to the next: state
space, linear-attention and short-convolution layers do, and some rotary embeddings choose their frequencies
by the longest sequence in the batch. Such models get one sequence per stream (as determined by
rayrlhf.models.probe); the code that uses the hidden states is the same.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rayrlhf.models.attention import packed_inputs


class Streams(NamedTuple):
    """Which sequences may share a stream, e.g. Streams() for Llama, Streams(longest_packed=0) for LFM2."""

    longest_packed: int | None = None  # tokens; longer sequences get their own stream. None: all share one
    attention: str | None = None  # transformers' kernel, for models that cannot use ours; never packed

    @property
    def is_packed(self) -> bool:
        return self.longest_packed is None and self.attention is None


M = TypeVar("M", bound=Any)


def with_streams(model: M, streams: Streams) -> M:
    """Set the model's streams; returns the model."""
    model.streams = streams
    return model


def decoder_of(causal_lm: Any) -> Any:
    """The part of a language model that outputs hidden states. Raises `ValueError` if there is none."""
    for found in (causal_lm.get_decoder(), getattr(causal_lm, "model", None), causal_lm.base_model):
        if isinstance(found, nn.Module) and found is not causal_lm and not isinstance(found, nn.Linear):
            return found
    raise ValueError(f"{type(causal_lm).__name__} has no decoder that could be called without its head")


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers of the language model, without those of a vision tower."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and "visual" not in name.split(".")
    ]


def hidden_states(
    decoder: Any,
    input_ids: Tensor,  # [T]
    position_ids: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    streams: Streams,
) -> Tensor:
    """Hidden states [T, H] of concatenated sequences, whatever the division into streams."""
    if streams.is_packed:  # no device-to-host synchronisation for the sequence lengths
        return decoder(**packed_inputs(input_ids, position_ids, cu_seqlens)).last_hidden_state[0]
    bounds = cu_seqlens.tolist()
    groups = _groups(bounds, streams)
    num_passes = _most_passes(decoder, len(groups), cu_seqlens.device)
    if len(groups) == num_passes == 1 and streams.attention is None:
        return decoder(**packed_inputs(input_ids, position_ids, cu_seqlens)).last_hidden_state[0]
    outputs, where = [], []
    for group in groups:
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in group]).to(input_ids.device)
        lengths = torch.tensor([0, *(bounds[i + 1] - bounds[i] for i in group)])
        ends = lengths.cumsum(0).to(cu_seqlens)
        outputs.append(_one_stream(decoder, input_ids[rows], position_ids[rows], ends, streams))
        where.append(rows)
    hidden = torch.cat(outputs)[torch.cat(where).argsort()]
    for _ in range(num_passes - len(groups)):
        ends = torch.tensor([0, 1]).to(cu_seqlens)
        empty = _one_stream(decoder, input_ids[:1], position_ids[:1], ends, streams)
        hidden = hidden + 0.0 * empty.sum()  # takes part in the backward pass, too
    return hidden


def _one_stream(
    decoder: Any, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, streams: Streams
) -> Tensor:
    if streams.attention is not None:  # like transformers: its own causal mask and positions
        return decoder(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
    return decoder(**packed_inputs(input_ids, position_ids, cu_seqlens)).last_hidden_state[0]


def _groups(bounds: list[int], streams: Streams) -> list[list[int]]:
    """The sequences of each stream: those that may share one, then each other one alone."""
    lengths = [stop - start for start, stop in pairwise(bounds)]
    limit = 0 if streams.longest_packed is None else streams.longest_packed
    if streams.attention is not None:
        limit = 0
    short = [i for i, length in enumerate(lengths) if length <= limit]
    return [group for group in (short, *([i] for i, length in enumerate(lengths) if length > limit)) if group]


def _most_passes(decoder: nn.Module, count: int, device: torch.device) -> int:
    """The maximum over ranks if ZeRO-3 makes ranks gather each layer's weights together, else `count`."""
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in decoder.parameters())
    if not (is_partitioned and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
