"""Which tokens of a packed stream a rank computes: all, each shared prefix once, or its part of them.

Sequence parallelism: one packed stream sharded over several ranks, which communicate in attention layers.

Each rank holds the hidden states of its share of the tokens. A layer's keys and values, which are small with
grouped-query attention, are all-gathered in the group, and each rank's queries attend to them: the context
parallelism of Llama 3 (arXiv 2407.21783, section 3.3.2), which works for any number of heads. A rank holds
the i-th block of tokens from the front and the i-th from the back, as a token near the end attends to more
tokens than one near the start.

In addition to the legend of `rayrlhf.batch`: P  ranks of the group      n  tokens held by each of them
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.models.attention import packed_inputs, prefix_inputs
from rayrlhf.models.dropout import TrainedModule
from rayrlhf.models.streams import Streams, hidden_states
from rayrlhf.models.vision import SequenceImages, VisionInputs
from rayrlhf.prefixes import SharedPrefixes


@dataclass
class Share:
    """The tokens of a stream that this rank holds. Without a group: all of them, with `prefixes` in fewer
    rows.
    """

    num_tokens: int  # T
    num_padded: int  # tokens with padding at the end, which makes all shares equally long
    positions: Tensor  # [n] in the padded stream, one per row
    group: dist.ProcessGroup | None = None
    pieces: list[Piece] = field(default_factory=list)  # of the held tokens, in order; only with a group
    num_attended: int = 0  # attention layers that have processed this share
    prefixes: SharedPrefixes | None = None  # only without a group

    @staticmethod
    def of(
        cu_seqlens: Tensor,
        num_tokens: int,
        group: dist.ProcessGroup | None,
        prefixes: SharedPrefixes | None = None,
    ) -> Share:
        if prefixes is not None:
            if group is not None:
                raise ValueError(
                    "ranks that share a stream cannot share its prefixes: set train.share_prefixes to false"
                )
            return Share(num_tokens, num_tokens, prefixes.tokens, prefixes=prefixes)
        if group is None:
            return Share(num_tokens, num_tokens, torch.arange(num_tokens, device=cu_seqlens.device))
        share = Share.of_rank(cu_seqlens, num_tokens, dist.get_rank(group), group.size())
        return replace(share, group=group)

    @staticmethod
    def of_rank(cu_seqlens: Tensor, num_tokens: int, rank: int, size: int) -> Share:
        block = -(-num_tokens // (2 * size))
        num_padded = 2 * size * block
        blocks = [range(block * i, block * (i + 1)) for i in (rank, 2 * size - 1 - rank)]
        positions = torch.cat([torch.arange(b.start, b.stop) for b in blocks]).to(cu_seqlens.device)
        # The padding is a separate sequence: every rank attends in every layer, so all take part in backward.
        bounds = [*cu_seqlens.tolist(), num_padded]
        pieces = [piece for b in blocks for piece in _pieces(b, bounds)]
        return Share(num_tokens, num_padded, positions, pieces=pieces)

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's [n] of a tensor [T]; arbitrary values at padding positions."""
        if self.group is None and self.prefixes is None:
            return tokens
        return tokens[self.positions.clamp(max=self.num_tokens - 1)]

    def holds(self) -> Tensor:
        """Whether each token is held by this rank, [T]."""
        return self._rows() >= 0

    def rows_of(self, where: Tensor) -> Tensor:
        """This rank's row of each token at `where`; arbitrary for tokens of other ranks."""
        return self._rows()[where].clamp(min=0)

    def summed(self, part: Tensor) -> Tensor:
        """All-reduce: the sum over the group of each rank's part."""
        return part if self.group is None else _SumOverGroup.apply(part, self.group)

    def placed(self, values: Tensor) -> Tensor:
        """All-gather per-token values: local [n] → full stream [T], on every rank."""
        if self.prefixes is not None:
            return values[self.prefixes.rows]
        stream = values.new_zeros(self.num_padded).index_put((self.positions,), values)
        return self.summed(stream[: self.num_tokens])

    def _rows(self) -> Tensor:
        """Local row of each token, [T]; -1 for tokens of other ranks."""
        if self.prefixes is not None:
            return self.prefixes.rows
        rows = self.positions.new_full((self.num_padded,), -1)
        rows[self.positions] = torch.arange(len(self.positions), device=rows.device)
        return rows[: self.num_tokens]

    def gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All-gather keys and values: [1, kv_heads, n, head_dim] → [1, kv_heads, P·n, head_dim]."""
        assert self.group is not None
        keys_and_values = _GatherBlocks.apply(torch.stack([keys[0], values[0]]), self.group)
        return keys_and_values[:1], keys_and_values[1:]


class Piece(NamedTuple):
    """A run of held tokens of one sequence, as positions in the stream."""

    first: int
    stop: int
    start: int  # first position of the sequence


def _pieces(block: range, bounds: list[int]) -> list[Piece]:
    sequences = pairwise(bounds)
    cut = (Piece(max(block.start, start), min(block.stop, stop), start) for start, stop in sequences)
    return [piece for piece in cut if piece.first < piece.stop]


class PackedModel(TrainedModule):
    """A decoder over packed streams, and a head."""

    streams = Streams()
    # Ranks that compute each stream together; all must call the model with the same stream.
    sequence_group: dist.ProcessGroup | None = None

    vision: VisionInputs | None = None  # of a vision-language model

    def share_of(self, cu_seqlens: Tensor, num_tokens: int, prefixes: SharedPrefixes | None = None) -> Share:
        """The tokens of a stream that this rank holds."""
        return Share.of(cu_seqlens, num_tokens, self.sequence_group, prefixes)

    def decode(
        self,
        decoder: Any,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        images: SequenceImages = (),
        prefixes: SharedPrefixes | None = None,
    ) -> tuple[Tensor, Share]:
        """Hidden states [n, H] of the tokens that this rank holds, and its share.

        Raises `ValueError` for shared prefixes that this model cannot compute once.
        """
        share = self.share_of(cu_seqlens, input_ids.numel(), prefixes)
        if prefixes is not None:
            if self.vision is not None or not self.streams.is_packed:
                raise ValueError(
                    "this model cannot compute a shared prefix once: set train.share_prefixes to false"
                )
            hidden = decoder(**prefix_inputs(input_ids, position_ids, share)).last_hidden_state[0]
            check_layers(decoder.config.get_text_config().num_hidden_layers, share)
            return hidden, share
        if self.vision is not None:  # one rank per stream: config.vision refuses others
            return self.vision.hidden_states(decoder, input_ids, position_ids, cu_seqlens, images), share
        if share.group is None:
            return hidden_states(decoder, input_ids, position_ids, cu_seqlens, self.streams), share
        if needs_streams_of_one(cu_seqlens, self.streams):
            raise ValueError(
                "this model needs streams of one sequence, which ranks cannot share: "
                "set model.sequence_parallel to 1"
            )
        inputs = packed_inputs(share.take(input_ids), share.take(position_ids), cu_seqlens)
        hidden = decoder(**inputs, sequence_share=share).last_hidden_state[0]
        check_layers(decoder.config.get_text_config().num_hidden_layers, share)
        return hidden, share


def needs_streams_of_one(cu_seqlens: Tensor, streams: Streams) -> bool:
    if streams.is_packed:
        return False
    return streams.longest_packed is None or int(cu_seqlens.diff().max()) > streams.longest_packed


def check_layers(layers: int, share: Share) -> None:
    """Raises `ValueError` if layers mix tokens without our attention: they would silently see only a part of
    each sequence.
    """
    if share.num_attended != layers:
        fix = "model.sequence_parallel to 1" if share.prefixes is None else "train.share_prefixes to false"
        raise ValueError(
            f"{layers - share.num_attended} of this model's {layers} layers would see only a part of each "
            f"sequence, as their way of mixing tokens cannot share one: set {fix}"
        )


class _SumOverGroup(torch.autograd.Function):
    """All ranks compute the same loss from the same sum, so each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _GatherBlocks(torch.autograd.Function):
    """All-gather [2, kv_heads, n, head_dim] → [2, kv_heads, P·n, head_dim] in the stream's order."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = part.new_empty(group.size() * part.size(0), *part.shape[1:])
        dist.all_gather_single(parts, part.contiguous(), group=group)
        front, back = parts.view(group.size(), *part.shape).chunk(2, dim=-2)
        return torch.cat([*front, *back.flip(0)], dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = ctx.group.size()
        blocks = torch.stack(grad.chunk(2 * size, dim=-2))
        parts = torch.cat([blocks[:size], blocks[size:].flip(0)], dim=-2)  # [P, 2, kv_heads, n, head_dim]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_single(own, parts.flatten(0, 1), group=ctx.group)
        return own, None
