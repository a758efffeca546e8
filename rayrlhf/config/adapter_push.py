"""Whether pushes may send LoRA adapters alone (`rollout.weight_sync.lora`), as far as the config decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayrlhf.config.base import Problem
from rayrlhf.config.model import ENGINE_LORA_RANKS

if TYPE_CHECKING:
    from rayrlhf.config.policy import PolicyRunConfig

MAX_RANK = max(ENGINE_LORA_RANKS)


def why_adapters_are_merged(config: PolicyRunConfig) -> str | None:
    """Why engines cannot take the adapters alone; None if nothing in the config prevents it."""
    model = config.model
    if model.lora is None:
        return "model.lora is not given"
    if model.lora.rank > MAX_RANK:
        return f"model.lora.rank={model.lora.rank} is above {MAX_RANK}, vLLM's largest"
    return None


def adapters_can_travel_alone(config: PolicyRunConfig) -> Problem | None:
    reason = why_adapters_are_merged(config)
    if config.rollout.weight_sync.lora != "adapter" or reason is None:
        return None
    return Problem(
        "rollout.weight_sync.lora",
        got=f"adapter, but {reason}",
        wanted=f"adapters, of a rank up to {MAX_RANK}",
        fix="set rollout.weight_sync.lora to merged or auto",
    )
