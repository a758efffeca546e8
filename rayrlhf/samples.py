"""Row types: prompts, samples and supervised examples, before they are packed into tensors.

This module does not import torch, which takes seconds: most processes of a run handle rows only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EncodedImage:
    """An image as in its file; pixel values are made when a micro-batch is computed."""

    content: bytes = field(repr=False)  # PNG, JPEG or another format that PIL reads
    num_tokens: int  # image tokens that stand for it in the token ids


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt data set, rendered and tokenised."""

    row_id: int  # index in the prepared data set, stable across epochs and resumes
    prompt_ids: list[int]
    prompt: str  # what `prompt_ids` decodes to, special tokens included
    columns: dict[str, Any] = field(default_factory=dict)  # every column of the data row, `label` included
    images: tuple[EncodedImage, ...] = ()  # in the order of their tokens in `prompt_ids`


@dataclass(frozen=True)
class Sample:
    """One response to one prompt, as the engine produced it. Token ids are never recomputed from text.

    The second of a group's responses, scored and compared with the others:

    >>> sample = Sample(
    ...     group_id=7,
    ...     sample_index=1,
    ...     prompt=Prompt(row_id=3, prompt_ids=[1, 12, 9], prompt="<s>2+2=", columns={"label": "4"}),
    ...     response_ids=[28, 2],
    ...     response="4",
    ...     rollout_logprobs=[-0.11, -0.02],
    ...     loss_mask=[1, 1],
    ...     policy_versions=[41, 41],
    ...     truncated=False,
    ...     source_rewards=(1.0,),
    ...     score=1.0,
    ...     group_advantage=0.5,
    ... )
    >>> sample.num_tokens, sample.policy_version
    (5, 41)
    """

    group_id: int  # index of the prompt in the run's prompt stream; members of a group share it
    sample_index: int  # 0 .. group_size-1
    prompt: Prompt
    response_ids: list[int]
    response: str  # decoded without special tokens, for reward functions and logs
    rollout_logprobs: list[float]  # one per response token
    loss_mask: list[int]  # one per response token; 0 on tokens the policy did not produce
    policy_versions: list[int]  # one per response token: version of the weights that sampled or read it
    truncated: bool  # stopped by the token limit, not by a stop token
    source_rewards: tuple[float | None, ...] = ()  # raw, one per reward source; None if it failed
    score: float | None = None  # combined reward; None until scored, and if a source failed
    group_advantage: float | None = None  # relative to its group; None for estimators without groups
    episode_reward: float | None = None  # sum over an environment's turns; None without one or if it failed
    num_turns: int = 1  # responses of the policy within the sample
    failure: str = ""  # why an episode has no reward
    # [num_tokens, L, K] int16, with router replay: each token's experts in the L layers that have some; -1:
    # unknown.
    routed_experts: Any = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.prompt_ids) + len(self.response_ids)

    @property
    def policy_version(self) -> int:
        """The oldest policy version among its tokens; -1 for a sample without tokens."""
        return min(self.policy_versions, default=-1)

    @property
    def newest_policy_version(self) -> int:
        """That of its newest token: another one if weights were pushed while it was sampled; -1 as above."""
        return max(self.policy_versions, default=-1)


@dataclass(frozen=True)
class TokenSequence:
    """One token sequence with its loss mask."""

    input_ids: list[int]
    loss_mask: list[int]  # one per token
    targets: list[float] = field(default_factory=list)  # one per token if any token is labelled; else empty


@dataclass(frozen=True)
class Example:
    """One row of supervised data: the sequences that a loss compares, kept in the same micro-batch.

    A pair of answers to one prompt of two tokens, of which the answers alone have a loss:

    >>> chosen = TokenSequence(input_ids=[1, 12, 28, 2], loss_mask=[0, 0, 1, 1])
    >>> rejected = TokenSequence(input_ids=[1, 12, 30, 2], loss_mask=[0, 0, 1, 1])
    >>> Example(row_id=3, sequences=(chosen, rejected), value=0.5).num_tokens
    8
    """

    row_id: int  # index in the prepared data set
    sequences: tuple[TokenSequence, ...]  # one, or (chosen, rejected), or (response, mismatched response)
    value: float = 0.0  # the margin of a pair; 1 for a desirable response and 0 for an undesirable one
    images: tuple[EncodedImage, ...] = ()  # of each sequence, in the order of their tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.input_ids) for sequence in self.sequences)
