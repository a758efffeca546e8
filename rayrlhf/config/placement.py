"""`placement`: which role sits where."""

from __future__ import annotations

from typing import Annotated, Literal

from rayrlhf.config.base import NotBool, PositiveNumber, Section


class PlacementConfig(Section):
    preset: Literal["disaggregated", "colocate_all"] = "disaggregated"
    """disaggregated: every role has slots of its own; colocate_all: all roles share the same slots."""
    cpus_per_slot: PositiveNumber = 1.0
    """CPUs reserved per slot."""
    gpus_per_slot: Annotated[Literal[0, 1, "auto"], NotBool] = "auto"
    """GPUs per slot; auto is 1 on a cluster with GPUs."""
    start_timeout_seconds: PositiveNumber = 300
    """Deadline for the cluster to grant the slots."""
