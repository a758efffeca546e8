"""What flows as rows: prompts, samples and supervised examples, before they are packed into tensors.

Without torch, which takes seconds to import: most processes of a run handle rows only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt data set, rendered and tokenised."""

    row_id: int  # position in the prepared data set, stable across epochs and resumes
    prompt_ids: list[int]
    prompt: str  # what `prompt_ids` decodes to, special tokens included
    columns: dict[str, Any] = field(default_factory=dict)  # every column of the data row, `label` included


@dataclass(frozen=True)
class Sample:
    """One response to one prompt, as the engine produced it. Token ids are never re-made from text."""

    group_id: int  # the prompt's place in the run's stream of prompts; members of a group share it
    sample_index: int  # 0 .. group_size-1
    prompt: Prompt
    response_ids: list[int]
    response: str  # decoded without special tokens, for reward functions and people
    rollout_logprobs: list[float]  # one per response token
    loss_mask: list[int]  # one per response token; 0 on tokens the policy did not produce
    policy_versions: list[int]  # one per response token: the weights that sampled or read it
    truncated: bool  # stopped by the token limit, not by a stop token
    source_rewards: tuple[float | None, ...] = ()  # raw, one per reward source; None where it failed for good
    score: float | None = None  # what the sources come to together; None until scored, and where one failed
    group_advantage: float | None = None  # against the others of its group; None where none are compared
    episode_reward: float | None = None  # sum over an environment's turns; None without one or if it failed
    num_turns: int = 1  # responses of the policy within the sample
    failure: str = ""  # why an episode has no reward

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.prompt_ids) + len(self.response_ids)

    @property
    def policy_version(self) -> int:
        """The oldest weights that had a part in it; -1 for a sample without tokens."""
        return min(self.policy_versions, default=-1)


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that are read as one text, and which of them are to be learnt."""

    input_ids: list[int]
    loss_mask: list[int]  # one per token
    targets: list[float] = field(default_factory=list)  # one per token where a token is labelled; else empty


@dataclass(frozen=True)
class Example:
    """One row of supervised data: the sequences that a loss compares, which therefore stay together."""

    row_id: int  # position in the prepared data set
    sequences: tuple[TokenSequence, ...]  # one, or (chosen, rejected), or (response, mismatched response)
    value: float = 0.0  # the margin of a pair; 1 for a desirable response and 0 for an undesirable one

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.input_ids) for sequence in self.sequences)
