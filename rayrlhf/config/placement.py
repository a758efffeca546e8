"""`placement`: which role sits where."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import NotBool, Section


class PlacementConfig(Section):
    preset: Literal["disaggregated", "colocate_all"] = "disaggregated"
    """disaggregated: every role has slots of its own; colocate_all: all roles share the same slots."""
    cpus_per_slot: float = Field(1.0, gt=0)
    """CPUs reserved per slot."""
    gpus_per_slot: Annotated[Literal[0, 1, "auto"], NotBool] = "auto"
    """GPUs per slot; auto is 1 on a cluster with GPUs."""
    start_timeout_seconds: float = Field(300, gt=0)
    """Deadline for the cluster to grant the slots."""
