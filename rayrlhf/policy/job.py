"""Job description that the driver passes to every worker: the config, and names of actors and Serve apps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayrlhf.config.model import LoraConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.reward.deployments import RewardApp
from rayrlhf.weights.backend import Route


@dataclass(frozen=True)
class PolicyJob:
    config: PolicyRunConfig
    run_id: str  # unique per start of a run; prefixes the names of its actors and Serve apps
    reward_apps: tuple[RewardApp, ...]
    num_eval_prompts: int  # 0 = no evaluation
    threads_per_worker: int
    on_gpu: bool = False
    engines_sleep: bool = False  # while trainers have the memory of their slots
    weight_route: Route = "object_store"
    adapter: LoraConfig | None = None  # that weight pushes send alone; None: they send all weights
    fixed: dict[str, Any] = field(default_factory=dict)  # config values required for resuming

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
    def critic_channel(self) -> str:
        return f"{self.run_id}-critic"

    @property
    def weight_store(self) -> str:
        return f"{self.run_id}-weights"

    @property
    def board(self) -> str:
        return f"{self.run_id}-board"
