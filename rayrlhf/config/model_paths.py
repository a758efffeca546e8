"""Lists the models that a config names, with their keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SECTIONS = ("model", "critic", "ref", "teacher")


def model_paths(config: Any) -> Iterator[tuple[str, str]]:
    """(key, folder or id) of every model that a config of any job names."""
    for section in SECTIONS:
        path = getattr(getattr(config, section, None), "path", None)
        if path is not None:
            yield f"{section}.path", path
    reward = getattr(config, "reward", None)
    for index, source in enumerate(reward.sources if reward is not None else ()):
        if source.type == "model":
            yield f"reward.sources.{index}.path", source.path
