"""Message for an interrupted job: where the next start will resume."""

from __future__ import annotations

from typing import Any

from rayrlhf.config.common import DrivenConfig
from rayrlhf.storage.folder import run_folder
from rayrlhf.train.checkpoint import TRAIN_FOLDER, newest_step

AGAIN = "the same command"


def resume_message(config: DrivenConfig) -> str:
    """One sentence, from the checkpoints on disk, so that it never names a step that was not saved."""
    any_config: Any = config
    checkpoint = getattr(any_config, "checkpoint", None)
    if checkpoint is None:  # batch inference and chains: finished parts are in the run's folder
        return f"{AGAIN} resumes with the unfinished parts"
    step = newest_step(run_folder(config.run, TRAIN_FOLDER))
    if step:
        total = any_config.train.num_steps
        return f"{AGAIN} resumes from step {step}" + (f" of {total}" if total else "")
    every = checkpoint.every_steps
    setting = "null" if every is None else every
    return f"nothing is saved yet (checkpoint.every_steps={setting}): {AGAIN} starts from the beginning"
