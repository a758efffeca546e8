"""`rollout.environment`: multi-turn episodes with an environment of the user's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rayrlhf.config.base import Count, PositiveNumber, Section, Wanted

ClassName = Annotated[
    str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$"), Wanted("module:Class or path/to/file.py:Class")
]


class EnvironmentConfig(Section):
    environment: ClassName
    """`module:Class` or `path/file.py:Class`, with `reset(row)` and `step(response)`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""
    max_turns: Count = 8
    """Responses of the policy per episode."""
    timeout_seconds: PositiveNumber = 120
    """Deadline of an episode; its sample is then dropped and counted."""
    max_response_tokens: Count = 1024
    """Tokens of an episode after its opening messages: responses and observations of all turns."""
    num_replicas: Count = 1
    """Serve replicas that run episodes."""
