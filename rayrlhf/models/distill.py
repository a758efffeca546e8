"""Distillation: student and teacher models, compared at every loss token without a [tokens, vocab] tensor.

The teacher's output for N tokens is passed as its hidden states, from which its logits are computed in
chunks of rows (a teacher in the same worker), or as the log-probabilities of its k likeliest tokens (a
teacher behind a network). Both must have the same vocabulary; if their projections are padded to different
sizes, as those of Qwen2.5, they are compared over the common rows. The student's logits are computed in
chunks too, once in the forward and once in the backward pass; everything computed from them is plain autograd
code. A chunk needs about ten tensors [chunk, V], so it should be smaller than for log-probabilities alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from rayrlhf.algorithms.distill_losses import DISTILL_LOSSES, top_k_divergence
from rayrlhf.models.dropout import TrainedModule
from rayrlhf.models.fused_head import LogitScaling, ProjectionGradients, project, slices
from rayrlhf.models.logprobs import OutputHead, logit_scaling, loss_tokens
from rayrlhf.models.streams import Streams, decoder_of, hidden_states

# of_logits(logits [n, V], which rows) -> two numbers per row, [n] and [n]; differentiable
OfLogits: TypeAlias = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class TeacherHidden(NamedTuple):
    """Hidden states and output projection of the teacher, from which its logits are computed."""

    hidden: Tensor  # [N, H_t] in front of each token
    weight: Tensor  # [V, H_t] of the teacher's output projection
    bias: Tensor | None  # [V]
    scaling: LogitScaling


class TeacherTopK(NamedTuple):
    """The teacher's k likeliest tokens at each of N positions."""

    ids: Tensor  # [N, k] int64, different within a row
    logprobs: Tensor  # [N, k] fp32


Teacher: TypeAlias = TeacherHidden | TeacherTopK


def first_rows(teacher: Teacher, count: int) -> Teacher:
    """The teacher's output for the first loss tokens only."""
    if isinstance(teacher, TeacherHidden):
        return teacher._replace(hidden=teacher.hidden[:count])
    return TeacherTopK(teacher.ids[:count], teacher.logprobs[:count])


class DistillLogprobs(NamedTuple):
    logprobs: Tensor  # [T] fp32; 0 where the loss mask is 0
    divergence: Tensor  # [T] fp32, between teacher and student; 0 where the loss mask is 0


class ChunkedLogits(torch.autograd.Function):
    """first, second = f(hidden, weight, bias, scaling, chunk_tokens, of_logits), applied in chunks.

    | argument | shape | |
    |---|---|---|
    | hidden | [N, H] | any floating dtype |
    | weight | [V, H] | the dtype of `hidden`: that of the matrix products |
    | bias | [V] or None | the same |
    | first, second | [N] | fp32 (fp64 if `hidden` is): the result of `of_logits` |

    Logits are not stored: the backward pass recomputes them and differentiates `of_logits` there. The
    parameters themselves are saved, and all chunks accumulate into one weight gradient: see `FusedLogprobs`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: LogitScaling,
        chunk_tokens: int,
        of_logits: OfLogits,
    ) -> tuple[Tensor, Tensor]:
        block = _block(hidden, weight, chunk_tokens)
        first, second = (block.new_empty(hidden.size(0)) for _ in range(2))
        for rows in slices(0, hidden.size(0), chunk_tokens):
            logits = scaling.apply_(project(hidden[rows], weight, bias, out=block))
            first[rows], second[rows] = of_logits(logits, rows)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.scaling, ctx.chunk_tokens, ctx.of_logits = scaling, chunk_tokens, of_logits
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias = ctx.saved_tensors
        block = _block(hidden, weight, ctx.chunk_tokens)
        gradients = ProjectionGradients(ctx.needs_input_grad, hidden, weight, bias, block.dtype)
        for rows in slices(0, hidden.size(0), ctx.chunk_tokens):
            logits = ctx.scaling.apply_(project(hidden[rows], weight, bias, out=block))
            grad = _gradient_of(ctx.of_logits, logits, rows, [grad[rows] for grad in grad_outputs])
            gradients.add(rows, ctx.scaling.gradient_(grad, logits))
        return (*gradients.result(), None, None, None)


class DistillHead(OutputHead):
    """The student's output projection, fused with log-softmax, gather and the divergence to the teacher."""

    def __init__(
        self, projection: nn.Linear, *, chunk_tokens: int, scaling: LogitScaling, divergence: str, beta: float
    ) -> None:
        super().__init__(projection, chunk_tokens=chunk_tokens, scaling=scaling)
        if divergence not in DISTILL_LOSSES:
            raise ValueError(f"divergence={divergence!r} is not one of {', '.join(DISTILL_LOSSES)}")
        self.divergence = divergence
        self.beta = beta

    def forward(self, hidden: Tensor, targets: Tensor, *, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets` [N] and divergences [N], each after its row of `hidden` [N, H]."""

        def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            log_probs = logits.log_softmax(-1)  # [n, V]
            if isinstance(teacher, TeacherHidden):
                of_teacher = _logits(teacher, rows)
                both = min(logits.size(-1), of_teacher.size(-1))
                of_teacher = of_teacher[:, :both].log_softmax(-1).to(logits.dtype)
                compared = log_probs if both == logits.size(-1) else log_probs[:, :both].log_softmax(-1)
                divergence = DISTILL_LOSSES[self.divergence](compared, of_teacher, beta=self.beta)
            else:
                ids, logprobs = teacher.ids[rows], teacher.logprobs[rows].to(logits.dtype)
                divergence = top_k_divergence(self.divergence, log_probs, ids, logprobs, beta=self.beta)
            return log_probs.gather(-1, targets[rows, None]).squeeze(-1), divergence

        return ChunkedLogits.apply(hidden, self.weight, self.bias, self.scaling, self.chunk_tokens, of_logits)


class DistillModel(TrainedModule):
    """A causal language model with the outputs of `PolicyModel`, plus the divergence from its teacher.

    Its parameter names are those of `PolicyModel`.
    """

    streams = Streams()

    def __init__(
        self, causal_lm: PreTrainedModel, *, chunk_tokens: int, divergence: str, beta: float = 0.5
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        projection: Any = causal_lm.get_output_embeddings()
        self.head = DistillHead(
            projection,
            chunk_tokens=chunk_tokens,
            scaling=logit_scaling(causal_lm.config),
            divergence=divergence,
            beta=beta,
        )

    @property
    def vocabulary_size(self) -> int:
        return self.head.vocabulary_size

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        loss_mask: Tensor,  # [T]
        *,
        # By keyword: ZeRO-3 replaces tensors among positional arguments, the teacher's weight too.
        teacher: Teacher,  # rows: the tokens in the mask, in order, without first tokens of sequences
    ) -> DistillLogprobs:
        """Log-probability of each token in the mask, and the divergence at its position.

        Raises `ValueError` if the teacher's output is for a different number of tokens.
        """
        where, weight = loss_tokens(position_ids, loss_mask)
        teacher = self._checked(teacher, int(weight.sum()))
        decoder = decoder_of(self.causal_lm)
        hidden = hidden_states(decoder, input_ids, position_ids, cu_seqlens, self.streams)  # [T, H]
        logprobs, divergence = self.head(hidden[where - 1], input_ids[where], teacher=teacher)
        empty = torch.zeros(input_ids.numel(), device=hidden.device)
        return DistillLogprobs(
            empty.index_put((where,), logprobs * weight), empty.index_put((where,), divergence * weight)
        )

    def _checked(self, teacher: Teacher, count: int) -> Teacher:
        """Adds a row for the dummy token that the head runs on if there are no loss tokens."""
        if teacher[0].size(0) != count:
            raise ValueError(
                f"the teacher's output is for {teacher[0].size(0)} tokens; there are {count} loss tokens"
            )
        if count:
            return teacher
        if isinstance(teacher, TeacherHidden):
            return teacher._replace(hidden=F.pad(teacher.hidden, (0, 0, 0, 1)))
        return TeacherTopK(*(F.pad(rows, (0, 0, 0, 1)) for rows in teacher))


class TopKHead(OutputHead):
    """The teacher's output projection, fused with log-softmax and the choice of the k likeliest tokens."""

    def forward(self, hidden: Tensor, k: int, vocabulary_size: int) -> tuple[Tensor, Tensor]:
        """Token ids [N, k] below `vocabulary_size`, the likeliest first, and their log-probabilities [N, k]
        among these in fp32.
        """
        block = _block(hidden, self.weight, self.chunk_tokens)
        ids = torch.empty(hidden.size(0), k, dtype=torch.long, device=hidden.device)
        logprobs = torch.empty(hidden.size(0), k, device=hidden.device)
        for rows in slices(0, hidden.size(0), self.chunk_tokens):
            logits = self.scaling.apply_(project(hidden[rows], self.weight, self.bias, out=block))
            logits = logits[:, :vocabulary_size]
            normaliser = logits.logsumexp(-1, keepdim=True)
            values, ids[rows] = logits.topk(k, -1)
            logprobs[rows] = values - normaliser
        return ids, logprobs


class TeacherModel(nn.Module):
    """A causal language model that returns its prediction at the position of each loss token.

    Frozen, and always in eval mode, also after `train()`.
    """

    streams = Streams()

    def __init__(self, causal_lm: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        projection: Any = causal_lm.get_output_embeddings()
        self.head = TopKHead(projection, chunk_tokens=chunk_tokens, scaling=logit_scaling(causal_lm.config))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TeacherModel:
        return super().train(False)

    @property
    def vocabulary_size(self) -> int:
        return self.head.vocabulary_size

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        loss_mask: Tensor,  # [T]
        top_k: int | None = None,
        student_size: int | None = None,
    ) -> Teacher:
        """Teacher output for `DistillModel` on the same batch: hidden states, or the `top_k` likeliest tokens
        among those that a student with `student_size` logits has.

        An engine with ZeRO-3 returns hidden states together with an emptied weight; see `bound`.
        """
        where, weight = loss_tokens(position_ids, loss_mask)
        count = int(weight.sum())
        decoder = decoder_of(self.causal_lm)
        hidden = hidden_states(decoder, input_ids, position_ids, cu_seqlens, self.streams)  # [T, H]
        rows = hidden[where - 1]
        if top_k is None:
            return self.bound(rows[:count])
        both = min(self.vocabulary_size, student_size or self.vocabulary_size)
        if not 0 < top_k <= both:
            raise ValueError(f"top_k={top_k} must be in 1 .. {both}, the teacher's vocabulary")
        ids, logprobs = self.head(rows, top_k, both)
        return TeacherTopK(ids[:count], logprobs[:count])

    def top_k(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        loss_mask: Tensor,
        k: int,
        student_size: int | None = None,
    ) -> TeacherTopK:
        """The k likeliest tokens at the position of each loss token, computed in chunks."""
        answer = self(input_ids, position_ids, cu_seqlens, loss_mask, k, student_size)
        assert isinstance(answer, TeacherTopK)
        return answer

    def bound(self, hidden: Tensor) -> TeacherHidden:
        """Hidden states [N, H_t] with this model's output projection.

        Under ZeRO-3, the projection must be gathered during the student's forward and backward pass.
        """
        return TeacherHidden(hidden, self.head.weight, self.head.bias, self.head.scaling)


def check_same_vocabulary(
    student: Mapping[str, int], teacher: Mapping[str, int], *, student_size: int, teacher_size: int
) -> None:
    """Raises `ValueError` if the two cannot be compared token by token: if a token has a different id in the
    other vocabulary, or none, or if a head has no logit for it. The sizes are those of the heads, which may
    be padded.
    """
    strange = sorted(
        token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token)
    )
    if strange:
        first = strange[0]
        raise ValueError(
            f"the student's vocabulary of {len(student)} tokens and the teacher's of {len(teacher)} differ "
            f"in {len(strange)} tokens, such as {first!r} with the id {student.get(first)} and "
            f"{teacher.get(first)}; distillation compares them token by token, so both need the same. "
            "Fix: use a teacher of the student's model family"
        )
    largest = max(student.values(), default=-1)
    for whose, size in (("student", student_size), ("teacher", teacher_size)):
        if largest >= size:
            raise ValueError(f"the {whose} has {size} logits, but its tokenizer has ids up to {largest}")


@torch.no_grad()
def _logits(teacher: TeacherHidden, rows: slice) -> Tensor:
    """Teacher logits of a chunk, [n, V]."""
    projected = F.linear(teacher.hidden[rows], teacher.weight, teacher.bias)
    return teacher.scaling.apply_(projected.to(torch.promote_types(projected.dtype, torch.float32)))


def _gradient_of(of_logits: OfLogits, logits: Tensor, rows: slice, grads: list[Tensor]) -> Tensor:
    """Gradient of both outputs, weighted by `grads`, with respect to the logits; [n, V]."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        outputs = of_logits(leaf, rows)
    (grad,) = torch.autograd.grad(outputs, leaf, grads)
    return grad


def _block(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    """Buffer for the logits of any chunk, [chunk, V]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(min(chunk_tokens, hidden.size(0)), weight.size(0), dtype=wide)
