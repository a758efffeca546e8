"""Sections shared by all jobs: `run`, `observe`, and protocols of the sections that the driver reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field

from rayrlhf.config.base import NaturalNumber, Section, Wanted
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.train import CheckpointConfig, OptimizerConfig
from rayrlhf.storage.urls import is_url, joined


class RunSection(Section):
    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"),
        Wanted("letters, digits, '.', '_' and '-', not starting with '.'"),
    ]
    """Name of the run; the same name resumes it."""
    dir: str = "runs"
    """Parent of the run folders: a folder that all nodes share, or a URL such as s3://bucket/runs."""
    local_dir: str = "~/.cache/rayrlhf/runs"
    """On each node's disk: the run's copy, with a URL as run.dir, and shards on their way to storage."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, sampling and initialisation."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint; never refuses a folder that has one."""

    @property
    def path(self) -> str:
        """The run folder: everything that the run writes is in it. With a URL as `dir`, this node's copy."""
        return str(Path(self.dir) / self.name) if self.url is None else self.local_path

    @property
    def local_path(self) -> str:
        """The run's folder on this node's own disk."""
        parent = hashlib.sha256(self.dir.encode()).hexdigest()[:12]  # equal names in two buckets
        return str(Path(self.local_dir).expanduser() / parent / self.name)

    @property
    def url(self) -> str | None:
        """The run folder's URL; None if all nodes share a folder."""
        return joined(self.dir, self.name) if is_url(self.dir) else None

    @property
    def place(self) -> str:
        """Where users find the run's files: its URL or its path."""
        return self.url or self.path

    def absolute(self) -> Self:
        """With absolute paths, because workers have other working directories."""
        local_dir = str(Path(self.local_dir).expanduser().resolve())
        dir_ = self.dir if is_url(self.dir) else str(Path(self.dir).resolve())
        return self.model_copy(update={"dir": dir_, "local_dir": local_dir})


# What may differ from the run that is resumed, if the user allows it; runtime.resume has the keys.
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
    """offline writes to the run folder for a later upload."""


class ObserveConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases."""
    rollouts_per_step: NaturalNumber = 8
    """Rollouts written per step to rollouts.jsonl."""
    console: Literal["auto", "live", "lines", "quiet"] = "auto"
    """A live progress bar, plain lines, or nothing (quiet); auto is live on a terminal."""


class DrivenConfig(Protocol):
    """What the driver reads of any job's config."""

    @property
    def run(self) -> RunSection: ...

    @property
    def placement(self) -> PlacementConfig: ...

    @property
    def observe(self) -> ObserveConfig: ...


class JobConfig(DrivenConfig, Protocol):
    """The part of a training job's config that is the same for all training jobs."""

    @property
    def run(self) -> TrainedRunSection: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def train(self) -> OptimizerConfig: ...

    @property
    def checkpoint(self) -> CheckpointConfig: ...

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]: ...
