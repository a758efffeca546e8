"""Prompts, samples and configurations by the few fields that a test cares about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.samples import Prompt, Sample


def make_prompt(
    prompt_ids: Sequence[int] = (5, 6), *, row_id: int = 0, prompt: str = "ab", **columns: Any
) -> Prompt:
    return Prompt(row_id=row_id, prompt_ids=list(prompt_ids), prompt=prompt, columns=columns)


def make_sample(
    response_ids: Sequence[int] = (7, 8),
    *,
    prompt: Prompt | None = None,
    group_id: int = 0,
    sample_index: int = 0,
    response: str = "cd",
    rollout_logprobs: Sequence[float] | None = None,
    loss_mask: Sequence[int] | None = None,
    truncated: bool = False,
    policy_version: int = 0,
    score: float | None = 0.0,
) -> Sample:
    """Every response token is the policy's, at log-probability -1, by default."""
    return Sample(
        group_id=group_id,
        sample_index=sample_index,
        prompt=prompt or make_prompt(),
        response_ids=list(response_ids),
        response=response,
        rollout_logprobs=list(rollout_logprobs or [-1.0] * len(response_ids)),
        loss_mask=list(loss_mask or [1] * len(response_ids)),
        policy_versions=[policy_version] * len(response_ids),
        truncated=truncated,
        score=score,
    )


def make_config(**sections: dict[str, Any]) -> PolicyRunConfig:
    """The smallest valid configuration; `sections` are merged into it, one level deep."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "small"},
        "model": {"path": "models/tiny"},
        "data": {"train": "prompts.jsonl"},
        "reward": {"sources": [{"type": "function", "function": "rewards:length"}]},
        "train": {"num_steps": 10},
    }
    merged = {name: tree.get(name, {}) | sections.get(name, {}) for name in tree | sections}
    return PolicyRunConfig.model_validate(merged)
