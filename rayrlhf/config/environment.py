"""`rollout.environment`: the environment of multi-turn episodes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rayrlhf.config.base import Count, PositiveNumber, Wanted
from rayrlhf.config.user_code import CodeLimits

ClassName = Annotated[
    str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$"), Wanted("module:Class or path/to/file.py:Class")
]


class EnvironmentConfig(CodeLimits):
    environment: ClassName
    """Your Python class with reset(row) and step(response): `module:Class` or `path/file.py:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor; every episode has its own instance."""
    max_turns: Count = 8
    """Responses of the policy in an episode; after the last one it ends, done or not."""
    max_response_tokens: Count = 1024
    """Limit on everything after the opening messages, in tokens: responses and observations of all turns."""
    timeout_seconds: PositiveNumber = 120
    """Deadline of an episode, generation included; its sample is then dropped and counted."""
    num_replicas: Count = 1
    """Serve replicas that run episodes; each runs many at once."""
