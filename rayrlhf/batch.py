"""Packed micro-batches.

Legend for shape comments, used throughout the code:
  T  tokens of one packed stream      S  sequences packed into it      V  vocabulary      H  hidden size

Every per-token field has the length T of `input_ids`; index t describes token t. `logprobs[t]` is the
log-probability of token t given the tokens before it and `values[t]` the value of the state before it, so
position 0 of every sequence carries no prediction and is always masked. Nothing has length T-1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from rayrlhf.prefixes import SharedPrefixes
from rayrlhf.samples import EncodedImage, Example, Sample, TokenSequence


@dataclass(frozen=True)
class PackedBatch:
    """Sequences concatenated into one stream; the unit of one forward and backward pass.

    Two sequences of 3 and 2 tokens, of which the last two and the last one are loss tokens:

    >>> PackedBatch(
    ...     input_ids=torch.tensor([5, 6, 7, 8, 9]),
    ...     position_ids=torch.tensor([0, 1, 2, 0, 1]),
    ...     cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32),
    ...     loss_mask=torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]),
    ... ).num_sequences
    2
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, restarts at 0 in every sequence
    cu_seqlens: Tensor  # [S+1] int32, first 0 and last T
    loss_mask: Tensor  # [T] float32, 1 on loss tokens
    is_padding: bool = field(default=False, kw_only=True)  # a batch without real sequences, see below
    # [S] the images of each sequence, in the order of their tokens; empty if no sequence has any
    images: tuple[tuple[EncodedImage, ...], ...] = field(default=(), kw_only=True)
    # Which tokens models compute once for several sequences; None: each sequence is computed in full. All
    # other fields have an entry for every token of every sequence.
    prefixes: SharedPrefixes | None = field(default=None, kw_only=True)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_rows(self) -> int:
        """Rows that a decoder computes: tokens, those of shared prefixes once."""
        return self.num_tokens if self.prefixes is None else self.prefixes.num_rows

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def without_loss(self) -> Self:
        """The same sequences without loss tokens, on which heads take next to no time."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))

    def to(self, device: torch.device | str) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in values.items()
            if isinstance(value, Tensor | SharedPrefixes)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PolicyBatch(PackedBatch):
    """Responses of the policy, with the models' outputs before the step's updates once these are computed.

    >>> from rayrlhf.samples import Prompt
    >>> prompt = Prompt(row_id=3, prompt_ids=[1, 12, 9], prompt="<s>2+2=")
    >>> answered = Sample(7, 0, prompt, [28, 2], "4", [-0.11, -0.02], [1, 1], [41, 41], False, score=1.0)
    >>> batch = pack_samples([answered, answered])
    >>> batch.cu_seqlens.tolist(), batch.loss_mask.tolist()
    ([0, 5, 10], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    """

    scores: Tensor  # [S] float32
    group_ids: Tensor  # [S] int64, one per prompt; -1 in a padding batch
    group_advantages: Tensor  # [S] float32, `Sample.group_advantage`; NaN where it is None
    rollout_logprobs: Tensor  # [T] float32, 0 outside the loss mask
    routed_experts: Tensor | None = None  # [T, L, K] int16, see `Sample`; None without router replay
    old_logprobs: Tensor | None = (
        None  # [T] the policy's; None if the first forward pass of the update gives them
    )
    ref_logprobs: Tensor | None = None  # [T] None without a reference
    values: Tensor | None = None  # [T] the critic's; None without one
    advantages: Tensor | None = None  # [T] given by `policy.batches.with_token_advantages`
    returns: Tensor | None = None  # [T] with a critic


@dataclass(frozen=True)
class ValueBatch(PackedBatch):
    """Training batch of a critic."""

    values: Tensor  # [T] the critic's before the step's updates
    returns: Tensor  # [T]


@dataclass(frozen=True)
class ExampleBatch(PackedBatch):
    """Supervised examples; the sequences of one example are next to each other."""

    row_ids: Tensor  # [S] int64, of the sequence's example; -1 in a padding batch
    targets: Tensor  # [T] float32, labels of tokens; 0 outside the loss mask
    example_values: Tensor  # [S] float32, `Example.value` of the sequence's example
    ref_sums: Tensor | None = None  # [S] the reference's log-probability of each sequence's loss tokens


def pack_samples(samples: Sequence[Sample], *, share_prefixes: bool = False) -> PolicyBatch:
    """Concatenate scored samples, consecutive ones with a common prefix for models that compute it once.

    Raises `ValueError` for an empty list or an unscored sample.
    """
    if not samples:
        raise ValueError("pack_samples needs at least one sample")
    unscored = [s.group_id for s in samples if s.score is None]
    if unscored:
        raise ValueError(f"samples of groups {unscored[:5]} have no score yet")
    for sample in samples:
        wanted, got = len(sample.response_ids), (len(sample.loss_mask), len(sample.rollout_logprobs))
        if got != (wanted, wanted):
            raise ValueError(
                f"a response of {wanted} tokens has (loss_mask, rollout_logprobs) of {got} entries"
            )
    input_ids: list[int] = []
    loss_mask: list[float] = []
    rollout_logprobs: list[float] = []
    lengths: list[int] = []
    for sample in samples:
        prompt_ids = sample.prompt.prompt_ids
        input_ids += [*prompt_ids, *sample.response_ids]
        loss_mask += [*[0.0] * len(prompt_ids), *map(float, sample.loss_mask)]
        rollout_logprobs += [*[0.0] * len(prompt_ids), *sample.rollout_logprobs]
        lengths.append(sample.num_tokens)
    mask = torch.tensor(loss_mask)
    batch = PolicyBatch(
        input_ids=torch.tensor(input_ids),
        position_ids=position_ids_of(lengths),
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=mask,
        scores=torch.tensor([s.score for s in samples], dtype=torch.float32),
        group_ids=torch.tensor([s.group_id for s in samples]),
        group_advantages=torch.tensor([_or_nan(s.group_advantage) for s in samples]),
        # Selected, not multiplied: a token that the policy did not produce may have any logprob, NaN too.
        rollout_logprobs=torch.where(mask > 0, torch.tensor(rollout_logprobs), 0.0),
        routed_experts=_routes(samples),
        images=_unless_none([sample.prompt.images for sample in samples]),
    )
    # A router that replays other experts computes another hidden state.
    routes = () if batch.routed_experts is None else (batch.routed_experts,)
    return _sharing(batch, *routes) if share_prefixes else batch


B = TypeVar("B", bound=PackedBatch)


def _sharing(batch: B, *inputs: Tensor) -> B:
    """The batch with the prefixes that its sequences share; `inputs` [T, …] in addition to the tokens."""
    if batch.images:
        raise ValueError("sequences with images share no prefixes: set train.share_prefixes to false")
    prefixes = SharedPrefixes.of(batch.cu_seqlens, batch.input_ids, batch.position_ids, *inputs)
    return replace(batch, prefixes=prefixes)


def _routes(samples: Sequence[Sample]) -> Tensor | None:
    """The samples' routes, all or none; -1 for a sample whose response is not the engine's any more."""
    known = [sample.routed_experts for sample in samples if sample.routed_experts is not None]
    if not known:
        return None
    unknown = torch.full(known[0].shape[1:], -1, dtype=torch.int16)
    return torch.cat(
        [
            unknown.expand(sample.num_tokens, *unknown.shape)
            if sample.routed_experts is None
            else torch.from_numpy(sample.routed_experts)
            for sample in samples
        ]
    )


def _unless_none(images: Sequence[tuple[EncodedImage, ...]]) -> tuple[tuple[EncodedImage, ...], ...]:
    return tuple(images) if any(images) else ()


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


def pack_examples(examples: Sequence[Example], *, share_prefixes: bool = False) -> ExampleBatch:
    """Concatenate the sequences of examples, those of one example next to each other in their order, and
    consecutive ones with a common prefix for models that compute it once.

    Raises:
        ValueError: for an empty list, and for a mask or targets of another length than the tokens.
    """
    sequences = [(example, sequence) for example in examples for sequence in example.sequences]
    if not sequences:
        raise ValueError("pack_examples needs at least one example")
    for example, sequence in sequences:
        wanted = len(sequence.input_ids)
        if len(sequence.loss_mask) != wanted or len(sequence.targets) not in (0, wanted):
            raise ValueError(
                f"a sequence of row {example.row_id} has {wanted} tokens, {len(sequence.loss_mask)} mask "
                f"entries and {len(sequence.targets)} targets"
            )
    lengths = [len(sequence.input_ids) for _, sequence in sequences]
    targets = [t for _, seq in sequences for t in (seq.targets or [0.0] * len(seq.input_ids))]
    batch = ExampleBatch(
        input_ids=torch.tensor([token for _, sequence in sequences for token in sequence.input_ids]),
        position_ids=position_ids_of(lengths),
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=torch.tensor([float(m) for _, sequence in sequences for m in sequence.loss_mask]),
        row_ids=torch.tensor([example.row_id for example, _ in sequences]),
        targets=torch.tensor(targets, dtype=torch.float32),
        example_values=torch.tensor([example.value for example, _ in sequences], dtype=torch.float32),
        images=_unless_none([example.images for example, _ in sequences]),
    )
    return _sharing(batch) if share_prefixes else batch


def pack_values(batch: PackedBatch, values: Tensor, returns: Tensor) -> ValueBatch:
    """The fields of a micro-batch that a critic reads, with `values` and `returns` [T]."""
    return ValueBatch(**vars(tokens_of(batch)), values=values, returns=returns)


def tokens_of(batch: PackedBatch) -> PackedBatch:
    """Only the fields that a model reads."""
    tokens = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
    return PackedBatch(*tokens, images=batch.images, is_padding=batch.is_padding, prefixes=batch.prefixes)


# Padding batches, of two tokens without loss, let a rank run as many micro-batches as the others. They have
# the fields of real batches, and later fields are added to them too, so that metrics that depend on a field
# have the same keys on every rank.


def padding_examples(sequences_per_example: int) -> ExampleBatch:
    """`pack_examples` of an example without a loss token (row id -1)."""
    nothing = TokenSequence(input_ids=[0, 0], loss_mask=[0, 0])
    batch = pack_examples([Example(row_id=-1, sequences=(nothing,) * sequences_per_example)])
    return replace(batch, is_padding=True)


def padding_tokens(token_id: int = 0) -> PackedBatch:
    return PackedBatch(
        input_ids=torch.full((2,), token_id),
        position_ids=position_ids_of([2]),
        cu_seqlens=cu_seqlens_of([2]),
        loss_mask=torch.zeros(2),
        is_padding=True,
    )


def padding_samples(token_id: int = 0) -> PolicyBatch:
    """`pack_samples` of a sample without a loss token (group id -1)."""
    tokens = padding_tokens(token_id)
    return PolicyBatch(
        **vars(tokens),
        scores=torch.zeros(1),
        group_ids=torch.tensor([-1]),
        group_advantages=torch.zeros(1),
        rollout_logprobs=torch.zeros(2),
    )


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """Boundaries [S+1] of sequences with these lengths."""
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def position_ids_of(lengths: Sequence[int]) -> Tensor:
    """Positions [T] that restart at 0 in every sequence."""
    return torch.cat([torch.arange(n) for n in lengths])


def sequence_ids_of(cu_seqlens: Tensor) -> Tensor:
    """For every token the index of its sequence, [T]."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=cu_seqlens.device), lengths)
