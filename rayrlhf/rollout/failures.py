"""What can go wrong with an engine, in words that travel between processes."""

from __future__ import annotations


class EngineDied(RuntimeError):
    """The vLLM engine of a replica has stopped for good; the message is its own last error."""
