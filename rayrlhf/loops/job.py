"""What the driver hands to every worker: the config and the names of what it has set up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.placement.routes import Route

RewardApp = tuple[str, float, str]  # source name, weight, Serve app ("" where it needs none)


def reward_app_names(reward: RewardConfig, run_id: str) -> tuple[RewardApp, ...]:
    named = enumerate(zip(reward.source_names, reward.sources, strict=True))
    return tuple(
        (name, source.weight, "" if source.type == "environment" else f"{run_id}-reward{index}")
        for index, (name, source) in named
    )


@dataclass(frozen=True)
class PolicyJob:
    config: PolicyRunConfig
    run_id: str  # unique per start of a run; prefixes the names of its actors and Serve apps
    reward_apps: tuple[RewardApp, ...]
    num_eval_prompts: int  # 0 = no evaluation
    threads_per_worker: int
    weight_route: Route = "object_store"
    fixed: dict[str, Any] = field(default_factory=dict)  # what it can only be resumed with

    @property
    def rollout_app(self) -> str:
        return f"{self.run_id}-rollout"

    @property
    def environment_app(self) -> str:
        return f"{self.run_id}-environment"

    @property
    def ref_app(self) -> str:
        return f"{self.run_id}-ref"

    @property
    def mailbox(self) -> str:
        return f"{self.run_id}-critic"

    @property
    def weight_hub(self) -> str:
        return f"{self.run_id}-weights"

    @property
    def board(self) -> str:
        return f"{self.run_id}-board"
