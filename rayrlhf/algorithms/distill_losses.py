"""Divergences between a teacher's and a student's distribution of the next token.

Shapes: n tokens, V vocabulary, k top tokens of the teacher, B outcomes. Every divergence takes
log-probabilities of the same outcomes [n, B] and returns one number per token, [n]; only the student's carry
a gradient. The outcomes are the vocabulary, or those of `top_k_outcomes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The remaining probability of the other tokens is a difference in fp32: below this it is rounding.
MIN_TAIL = 1e-7
LEAST_LOGPROB = -1e30

DistillLoss = Callable[..., Tensor]


def forward_kl(student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """KL(teacher || student), [n]: covers all that the teacher does (arXiv 1503.02531). No effect: `beta`."""
    return _kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """KL(student || teacher), [n]: stays within what the teacher does (arXiv 2306.08543). No effect: `beta`.

    Infinite where the teacher excludes a token that the student does not.
    """
    return _kl(student, teacher)


def jsd(student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """β·KL(teacher || m) + (1-β)·KL(student || m) with m = β·teacher + (1-β)·student, [n].

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649): bounded, and by its gradient near
    the forward KL for β → 0 and near the reverse KL for β → 1. Raises `ValueError` unless 0 < β < 1.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta={beta} must be > 0 and < 1 (where the divergence is 0 for any student): "
            "for the limits use forward_kl or reverse_kl"
        )
    # Where both exclude a token, logaddexp has no gradient: there, the student is only all but sure.
    mixture = torch.logaddexp(teacher + math.log(beta), student.clamp_min(LEAST_LOGPROB) + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


DISTILL_LOSSES: dict[str, DistillLoss] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def divergence(
    name: str,
    student_logits: Tensor,  # [n, V]
    teacher_logprobs: Tensor,  # [n, V]
    *,
    beta: float = 0.5,
) -> Tensor:
    """Divergence `name` of `DISTILL_LOSSES` over the whole vocabulary, [n]."""
    return _named(name)(student_logits.log_softmax(-1), teacher_logprobs, beta=beta)


def top_k_divergence(
    name: str,
    student_logits: Tensor,  # [n, V]
    teacher_ids: Tensor,  # [n, k] int64, all different within a row
    teacher_logprobs: Tensor,  # [n, k] of the whole vocabulary, so that they sum to less than 1
    *,
    beta: float = 0.5,
) -> Tensor:
    """Divergence `name` between k + 1 outcomes, [n]: the teacher's k tokens, and all the others as one.

    A lower bound of `divergence` for each of `DISTILL_LOSSES`: these are f-divergences, and f-divergences
    never grow when outcomes are merged (the data-processing inequality). It is attained where student and
    teacher are proportional to each other over the merged tokens, thus for k = V; over these tokens only
    their total is constrained. A teacher's rest below 1e-7 counts as 1e-7.
    """
    student, teacher = top_k_outcomes(student_logits, teacher_ids, teacher_logprobs)
    return _named(name)(student, teacher, beta=beta)


def top_k_outcomes(
    student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's log-probabilities of the k tokens and of all others together.

    Both [n, k+1], or [n, V] if k = V and there are no others.
    """
    normaliser = student_logits.logsumexp(-1, keepdim=True)
    student = student_logits.gather(-1, teacher_ids) - normaliser
    if teacher_ids.size(-1) == student_logits.size(-1):
        return student, teacher_logprobs
    others = student_logits.scatter(-1, teacher_ids, -torch.inf).logsumexp(-1, keepdim=True) - normaliser
    tail = (1.0 - teacher_logprobs.exp().sum(-1, keepdim=True)).clamp_min(MIN_TAIL).log()
    return torch.cat([student, others], -1), torch.cat([teacher_logprobs, tail], -1)


def _kl(of: Tensor, to: Tensor) -> Tensor:
    """KL(of || to), [n], from log-probabilities [n, B]; an outcome that `of` excludes adds 0."""
    return (of.exp() * torch.where(of.isneginf(), 0.0, of - to)).sum(-1)


def _named(name: str) -> DistillLoss:
    if name not in DISTILL_LOSSES:
        raise ValueError(f"divergence={name!r} is not one of {', '.join(DISTILL_LOSSES)}")
    return DISTILL_LOSSES[name]
