"""The whole tree of a policy run, and what must hold between its sections."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.base import Section
from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.model import CriticConfig, ModelConfig, RefConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.rollout import RolloutConfig
from rayrlhf.config.train import CheckpointConfig, EvalConfig, TrainConfig


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run; the same name resumes it."""
    dir: str = "runs"
    """Folder that holds the folders of runs."""
    seed: int = Field(0, ge=0)
    """Seed of data order, sampling and initialisation."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint; never refuses a folder that has one."""

    @property
    def path(self) -> str:
        return str(Path(self.dir) / self.name)


class WandbConfig(Section):
    project: str
    """Weights & Biases project."""
    entity: str | None = None
    """Team or user."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes to the run's folder for a later upload."""


class ObserveConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases."""
    rollouts_per_step: int = Field(8, ge=0)
    """Rollouts kept per step in rollouts.jsonl."""
    console: Literal["auto", "live", "lines", "quiet"] = "auto"
    """A live bar, plain lines, or nothing; auto is live on a terminal."""


class PolicyRunConfig(Section):
    run: RunSection
    """Name, folder and seed."""
    model: ModelConfig
    """The actor."""
    critic: CriticConfig | None = None
    """The critic, for advantage: gae."""
    ref: RefConfig | None = None
    """The reference policy of the KL penalty."""
    data: PromptDataConfig
    """Prompts."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Estimator, objective, KL."""
    rollout: RolloutConfig = RolloutConfig()
    """Engines and sampling."""
    reward: RewardConfig
    """What scores a sample."""
    placement: PlacementConfig = PlacementConfig()
    """Which role sits where."""
    train: TrainConfig
    """Optimisation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out prompts."""
    observe: ObserveConfig = ObserveConfig()
    """Console, TensorBoard, Weights & Biases, kept rollouts."""

    @property
    def needs_critic(self) -> bool:
        return self.algorithm.advantage == "gae"

    @property
    def needs_ref(self) -> bool:
        return self.algorithm.kl_coef > 0
