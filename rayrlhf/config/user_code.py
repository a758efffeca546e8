"""Limits of user code (reward functions, environments), which runs in separate processes."""

from __future__ import annotations

from rayrlhf.config.base import PositiveNumber, Section


class CodeLimits(Section):
    """Limits of user code, which runs in separate processes."""

    start_timeout_seconds: PositiveNumber = 120
    """Deadline of importing it, before the run and in each replica."""
    max_memory_gib: PositiveNumber | None = None
    """Memory that its process may use before it is killed; half of the machine's when left out."""
