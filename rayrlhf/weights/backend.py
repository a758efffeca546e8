"""Which way weights travel from trainers to engines: `rollout.weight_sync.backend`, resolved. Pure."""

from __future__ import annotations

from typing import Literal

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.placement.plan import PlacementSpec

Route = Literal["nccl", "ipc", "gloo", "object_store"]
KEY = "rollout.weight_sync.backend"
TOLD: dict[Route, str] = {
    "nccl": "by NCCL broadcast",
    "ipc": "in the memory that they share with the trainers (ipc)",
    "gloo": "by gloo broadcast",
    "object_store": "through Ray's object store",
}


def weight_route(config: PolicyRunConfig, spec: PlacementSpec, *, have_gpus: bool) -> Route:
    """Raises `ConfigError` for a way that these slots do not have.

    auto: between GPUs ipc where every engine shares its slots with trainers, nccl where none does, and the
    object store otherwise; on CPUs the object store.
    """
    asked = config.rollout.weight_sync.backend
    trainers = {slot for unit in spec.of("actor").units for slot in unit}
    engines = {slot for unit in spec.of("rollout").units for slot in unit}
    inside, apart = engines <= trainers, not engines & trainers
    if asked == "auto":
        if have_gpus:
            return "ipc" if inside else "nccl" if apart else "object_store"
        return "object_store"
    if asked == "ipc" and not inside:
        wanted = "engines on the slots of actors, as in colocate_all"
        raise ConfigError([_problem("ipc", config, wanted, "nccl")])
    if asked == "nccl" and not apart:
        wanted = "engines on GPUs of their own: NCCL has one member on each"
        raise ConfigError([_problem("nccl", config, wanted, "ipc")])
    if asked == "nccl" and not have_gpus:
        fix = f"set {KEY} to gloo or auto"
        raise ConfigError([Problem(KEY, got="nccl without GPUs", wanted="GPUs", fix=fix)])
    return asked


def _problem(got: str, config: PolicyRunConfig, wanted: str, other: str) -> Problem:
    return Problem(
        KEY,
        got=f"{got} with placement.preset={config.placement.preset}",
        wanted=wanted,
        fix=f"set {KEY} to {other} or auto, or change placement.preset",
    )
