"""Checkpoints are read without running what is in them.

A pickle can call anything when it is opened, and DeepSpeed opens its files with `weights_only=False`. Here
torch is made to refuse, in DeepSpeed's code as in ours, whatever is not a tensor, a plain value or one of the
few classes that DeepSpeed's optimizer states hold. These hold numbers: none does anything when it is made.
https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only-security
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rayrlhf.train.manifest import DamagedCheckpoint

ALLOWED: tuple[type, ...] = (LossScaler, ZeroStageEnum, fragment_address)
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch reads it at every load, and it wins over the argument


class UnsafeCheckpoint(DamagedCheckpoint):
    """A file of a checkpoint holds what would run code when it is opened."""


@contextmanager
def only_tensors(folder: Path) -> Iterator[None]:
    """Inside, no `torch.load` of this process and of those that it starts runs code. Raises
    `UnsafeCheckpoint` naming the file below `folder` that would have.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            yield
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpoint(_story(folder, error)) from error
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def _story(folder: Path, error: pickle.UnpicklingError) -> str:
    where = (
        "; ".join(strange_files(sorted(folder.rglob("*.pt")))) or f"{folder}: {str(error).splitlines()[0]}"
    )
    return (
        f"{where}. Nothing of it was run. A checkpoint that rayrlhf has saved has no such thing: "
        "somebody has changed it. Fix: put the file back, or choose another run.name"
    )


def strange_files(paths: Sequence[Path]) -> list[str]:
    """What is in these files and in no checkpoint of ours. They are looked at, not opened."""
    return [f"{path}: {what}" for path in paths if (what := _strange(path))]


def _strange(path: Path) -> str | None:
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in ALLOWED}
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - known
    except Exception as error:
        return f"not a file of tensors ({type(error).__name__})"
    return f"it would call {', '.join(sorted(names))}" if names else None
