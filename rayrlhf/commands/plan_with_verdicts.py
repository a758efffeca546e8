"""`rayrlhf plan` with the verdicts on the architectures of a job's models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rayrlhf.capacity.model_shape import config_folder
from rayrlhf.commands import plan as plan_command
from rayrlhf.config.model_paths import model_paths


def main(words: Sequence[str]) -> int:
    """The exit code of `plan_command.main`."""
    return plan_command.main(words, _architectures)


def _architectures(config: Any) -> Iterator[str]:
    """A line per model. Models without a local config.json are named, without importing torch."""
    if not hasattr(config, "train"):
        return
    missing = [f"{key}={path}" for key, path in model_paths(config) if not config_folder(path)]
    if missing:
        yield f"{', '.join(missing)}: no config.json on this machine, so the architecture is not checked yet"
        return
    from rayrlhf.runtime.architecture_checks import (
        architecture_lines,  # imports torch, so not at the top: --help is fast
    )

    yield from architecture_lines(config)
