"""Loads checkpoints without executing code that they may contain.

Unpickling can call anything, and DeepSpeed loads its files with `weights_only=False`. Here torch is forced to
refuse, in DeepSpeed's code as in ours, everything that is not a tensor, a plain value or one of the few
classes in DeepSpeed's optimizer states. Those classes hold numbers; constructing them has no side effects.
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
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch reads it at every load; it overrides the argument


class UnsafeCheckpoint(DamagedCheckpoint):
    """A file of a checkpoint would run code when it is loaded."""


@contextmanager
def only_tensors(folder: Path) -> Iterator[None]:
    """In this context no `torch.load` runs code, in this process and its child processes.

    Raises:
        UnsafeCheckpoint: naming the file below `folder` that would have run code.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            yield
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpoint(_message(folder, error)) from error
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def _message(folder: Path, error: pickle.UnpicklingError) -> str:
    where = "; ".join(unsafe_files(sorted(folder.rglob("*.pt")))) or f"{folder}: {str(error).splitlines()[0]}"
    return (
        f"{where}. None of it was run. rayrlhf saves no such file: the checkpoint was modified. "
        "Fix: restore the file, or choose another run.name"
    )


def unsafe_files(paths: Sequence[Path]) -> list[str]:
    """A line for each file with contents that rayrlhf never saves. The files are scanned, not unpickled."""
    return [f"{path}: {problem}" for path in paths if (problem := _unsafe_contents(path))]


def _unsafe_contents(path: Path) -> str | None:
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in ALLOWED}
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - known
    except Exception as error:
        return f"not a file of tensors ({type(error).__name__})"
    return f"it would call {', '.join(sorted(names))}" if names else None
