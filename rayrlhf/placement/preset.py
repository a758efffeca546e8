"""Resolve `placement.preset: auto` to a preset that fits the available resources. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from rayrlhf.config.base import ConfigError
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.placement.plan import PlacementSpec

C = TypeVar("C", bound=Any)
ROOMIEST = "disaggregated"


def with_preset(config: C, plan: Callable[[C], PlacementSpec], fits: Callable[[PlacementSpec], bool]) -> C:
    """The config with the first preset whose slots fit; the preset with the most slots if none fits.

    Roles cannot share the device of an engine that runs at the same time: asynchronous rollouts need separate
    slots.
    """
    if config.placement.preset != "auto":
        return config
    narrower = ["colocate_actor_ref", "colocate_all"]
    if isinstance(config, PolicyRunConfig) and config.rollout.max_staleness is not None:
        narrower.remove("colocate_all")
    roomiest = _with(config, ROOMIEST)
    for candidate in (roomiest, *(_valid(config, preset) for preset in narrower)):
        if candidate is not None and fits(plan(candidate)):
            return candidate
    return roomiest


def _with(config: Any, preset: str) -> Any:
    placement = config.placement.model_copy(update={"preset": preset})
    return type(config).model_validate(dict(config) | {"placement": placement})


def _valid(config: Any, preset: str) -> Any:
    """None if other settings contradict the preset, such as workers for a critic in a separate trainer."""
    try:
        return _with(config, preset)
    except (ConfigError, ValidationError):
        return None
