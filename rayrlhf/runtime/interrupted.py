"""What the next start of an interrupted job finds, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayrlhf.config.common import DrivenConfig
from rayrlhf.train.checkpoint import TRAIN_FOLDER, newest_step

AGAIN = "the same command"


def what_goes_on(config: DrivenConfig) -> str:
    """From what is on disk, so that nobody waits for a step that was never saved."""
    any_config: Any = config
    checkpoint = getattr(any_config, "checkpoint", None)
    if checkpoint is None:  # batch inference and chains: finished parts lie in the run's folder
        return f"{AGAIN} goes on with what is not finished yet"
    step = newest_step(Path(config.run.path) / TRAIN_FOLDER)
    if step:
        total = any_config.train.num_steps
        return f"{AGAIN} goes on from step {step}" + (f" of {total}" if total else "")
    every = checkpoint.every_steps
    setting = "null" if every is None else every
    return f"nothing is saved yet (checkpoint.every_steps={setting}): {AGAIN} starts from the beginning"
