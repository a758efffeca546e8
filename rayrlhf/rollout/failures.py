"""Exceptions of rollout engines. Importable without vLLM, so that they can be pickled between processes."""

from __future__ import annotations


class EngineAsleep(RuntimeError):
    """A request was still running when its engine was put to sleep."""


class EngineDied(RuntimeError):
    """The vLLM engine of a replica has stopped permanently; the message is its last error."""
