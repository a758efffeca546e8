"""Resolve `rollout.weight_sync.backend` to a weight transfer backend for the run's placement. Pure."""

from __future__ import annotations

from typing import Literal

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.placement.plan import PlacementSpec

Route = Literal["nccl", "ipc", "gloo", "object_store"]
KEY = "rollout.weight_sync.backend"
ROUTE_DESCRIPTIONS: dict[Route, str] = {
    "nccl": "by NCCL broadcast",
    "ipc": "in the memory that they share with the trainers (ipc)",
    "gloo": "by gloo broadcast",
    "object_store": "through Ray's object store",
}


def weight_route(config: PolicyRunConfig, spec: PlacementSpec, *, have_gpus: bool) -> Route:
    """The backend for this placement; "auto" is resolved.

    auto on GPUs: ipc if every engine shares its slots with trainers, nccl if none does, otherwise the object
    store. auto on CPUs: the object store.

    Raises:
        ConfigError: if the placement does not support the configured backend.
    """
    backend = config.rollout.weight_sync.backend
    trainers = {slot for unit in spec.of("actor").units for slot in unit}
    engines = {slot for unit in spec.of("rollout").units for slot in unit}
    colocated, separate = engines <= trainers, not engines & trainers
    if backend == "auto":
        if have_gpus:
            return "ipc" if colocated else "nccl" if separate else "object_store"
        return "object_store"
    if backend == "ipc" and not colocated:
        wanted = "engines on the slots of actors, as in colocate_all"
        raise ConfigError([_problem("ipc", config, wanted, "nccl")])
    if backend == "nccl" and not separate:
        wanted = "engines on separate GPUs: NCCL allows one rank per GPU"
        raise ConfigError([_problem("nccl", config, wanted, "ipc")])
    if backend == "nccl" and not have_gpus:
        fix = f"set {KEY} to gloo or auto"
        raise ConfigError([Problem(KEY, got="nccl without GPUs", wanted="GPUs", fix=fix)])
    return backend


def _problem(got: str, config: PolicyRunConfig, wanted: str, other: str) -> Problem:
    return Problem(
        KEY,
        got=f"{got} with placement.preset={config.placement.preset}",
        wanted=wanted,
        fix=f"set {KEY} to {other} or auto, or change placement.preset",
    )
