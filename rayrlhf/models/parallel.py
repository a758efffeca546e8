"""Sequence parallelism: one packed stream on several ranks, which meet in every attention layer.

Each rank holds the hidden states of its share of the tokens. A layer's keys and values, of which there are
few under grouped-query attention, are gathered from the group, and each rank's queries attend to them: the
context parallelism of Llama 3 (arXiv 2407.21783, section 3.3.2), which asks nothing of the number of heads.
A rank holds the i-th block of tokens from the front and the i-th from the back, as a token near the end
attends to more than one near the start.

Beside the legend of `rayrlhf.batch`: P  ranks of the group      n  tokens that each of them holds
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.models.attention import packed_inputs
from rayrlhf.models.dropout import TrainedModule
from rayrlhf.models.streams import Streams, hidden_states


@dataclass
class Share:
    """Which tokens of a stream this rank holds. Without a group: all of them."""

    num_tokens: int  # T
    num_padded: int  # with filler after the last token, which makes all shares equally long
    positions: Tensor  # [n] in the padded stream
    group: dist.ProcessGroup | None = None
    pieces: list[Piece] = field(default_factory=list)  # of the held tokens, in their order; with a group
    num_attended: int = 0  # attention layers that have seen this share

    @staticmethod
    def of(cu_seqlens: Tensor, num_tokens: int, group: dist.ProcessGroup | None) -> Share:
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
        # The filler is a sequence of its own: every rank attends in every layer, so all go back through them.
        bounds = [*cu_seqlens.tolist(), num_padded]
        pieces = [piece for b in blocks for piece in _pieces(b, bounds)]
        return Share(num_tokens, num_padded, positions, pieces=pieces)

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's [n] of a tensor [T]; any in the place of filler."""
        return tokens if self.group is None else tokens[self.positions.clamp(max=self.num_tokens - 1)]

    def holds(self) -> Tensor:
        """Of each token whether it is held here, [T]."""
        return self._rows() >= 0

    def rows_of(self, where: Tensor) -> Tensor:
        """In which of this rank's rows the tokens at `where` are; any for those that others hold."""
        return self._rows()[where].clamp(min=0)

    def summed(self, part: Tensor) -> Tensor:
        """The sum over the group of what each rank has made of the tokens that it holds."""
        return part if self.group is None else _SumOverGroup.apply(part, self.group)

    def placed(self, values: Tensor) -> Tensor:
        """Of one value per held token, [n], those of the whole stream, [T], on every rank."""
        stream = values.new_zeros(self.num_padded).index_put((self.positions,), values)
        return self.summed(stream[: self.num_tokens])

    def _rows(self) -> Tensor:
        """[T], -1 for tokens that others hold."""
        rows = self.positions.new_full((self.num_padded,), -1)
        rows[self.positions] = torch.arange(len(self.positions), device=rows.device)
        return rows[: self.num_tokens]

    def gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[1, kv_heads, P·n, head_dim] of the stream from this rank's [1, kv_heads, n, head_dim]."""
        assert self.group is not None
        keys_and_values = _GatherBlocks.apply(torch.stack([keys[0], values[0]]), self.group)
        return keys_and_values[:1], keys_and_values[1:]


class Piece(NamedTuple):
    """A run of held tokens of one sequence, as positions in the stream."""

    first: int
    stop: int
    start: int  # of the sequence


def _pieces(block: range, bounds: list[int]) -> list[Piece]:
    sequences = pairwise(bounds)
    cut = (Piece(max(block.start, start), min(block.stop, stop), start) for start, stop in sequences)
    return [piece for piece in cut if piece.first < piece.stop]


class PackedModel(TrainedModule):
    """A decoder over packed streams, and a head."""

    streams = Streams()
    # The ranks that compute each stream together; each of them must call the model on the same one.
    sequence_group: dist.ProcessGroup | None = None

    def decode(
        self, decoder: Any, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Share]:
        """Hidden states [n, H] of the tokens that this rank holds, and which they are."""
        share = Share.of(cu_seqlens, input_ids.numel(), self.sequence_group)
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
    """Raises `ValueError` where layers mix tokens without our attention: they would see a part of each
    sequence, without a word.
    """
    if share.num_attended != layers:
        raise ValueError(
            f"{layers - share.num_attended} of this model's {layers} layers would see only a part of each "
            "sequence, as their way of mixing tokens cannot share one: set model.sequence_parallel to 1"
        )


class _SumOverGroup(torch.autograd.Function):
    """All ranks go on with the same sum to the same loss, so each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _GatherBlocks(torch.autograd.Function):
    """From [2, kv_heads, n, head_dim] of each rank to [2, kv_heads, P·n, head_dim] in the stream's order."""

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
