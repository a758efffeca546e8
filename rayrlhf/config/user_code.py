"""What every kind of code of the user's has: limits, since it runs in processes of its own."""

from __future__ import annotations

from rayrlhf.config.base import PositiveNumber, Section


class CodeLimits(Section):
    """What code of the user's may take; it runs in processes of its own."""

    start_timeout_seconds: PositiveNumber = 120
    """Deadline of importing it, before the run and in each replica."""
    max_memory_gib: PositiveNumber | None = None
    """Memory that its process may use before it is killed; half of the machine's when left out."""
