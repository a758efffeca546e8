"""What every job has: `run`, `observe`, and the sections that the driver reads whatever the job learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from rayrlhf.config.base import NaturalNumber, Section, Wanted
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.train import CheckpointConfig, OptimizerConfig


class RunSection(Section):
    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"),
        Wanted("letters, digits, '.', '_' and '-', not starting with '.'"),
    ]
    """Name of the run; the same name resumes it."""
    dir: str = "runs"
    """Folder that holds the folders of runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, sampling and initialisation."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint; never refuses a folder that has one."""

    @property
    def path(self) -> str:
        """The run's folder: everything that the run writes lies in it."""
        return str(Path(self.dir) / self.name)


# What of a run may differ from the one that it resumes, if the user says so; runtime.resume has the keys.
Change = Literal["data", "batch", "model", "reward", "seed"]


class TrainedRunSection(RunSection):
    allow_changes: list[Change] = Field(default_factory=list[Change])
    """What may differ from the run that is resumed: data, batch, model, reward, seed."""


class WandbConfig(Section):
    project: str = Field(min_length=1)
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
    rollouts_per_step: NaturalNumber = 8
    """Rollouts kept per step in rollouts.jsonl."""
    console: Literal["auto", "live", "lines", "quiet"] = "auto"
    """A live bar, plain lines, or nothing; auto is live on a terminal."""


class DrivenConfig(Protocol):
    """What the driver reads of any job's config."""

    @property
    def run(self) -> RunSection: ...

    @property
    def placement(self) -> PlacementConfig: ...

    @property
    def observe(self) -> ObserveConfig: ...


class JobConfig(DrivenConfig, Protocol):
    """The part of a training job's config that does not depend on what it learns."""

    @property
    def run(self) -> TrainedRunSection: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def train(self) -> OptimizerConfig: ...

    @property
    def checkpoint(self) -> CheckpointConfig: ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...
