"""Random number generator states of a rank, such as for dropout masks, saved and restored."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.train.checkpoint import STATE_FILE

FOLDER = "random"  # in a checkpoint


class RandomStates:
    """torch's, Python's and NumPy's generators in this process.

    Models are initialised identically on all ranks. After that, each rank has its own random numbers: with
    equal ones, every rank would drop the same positions of its tokens. Ranks that share a sequence (sequence
    parallelism) hold different tokens, so their numbers differ too.
    """

    def __init__(self, seed: int, *, rank: int, world_size: int) -> None:
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._begin(step=0)

    def save(self, folder: Path) -> None:
        (folder / FOLDER).mkdir(exist_ok=True)
        torch.save(_states() | {"world_size": self.world_size}, self._file(folder))

    def load(self, folder: Path) -> None:
        """Restore this rank's states. If another number of ranks saved the checkpoint, or a version that
        saved no states, seed from the checkpoint's step instead.
        """
        file = self._file(folder)
        if file.is_file():
            states: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if states["world_size"] == self.world_size:
                _set(states)
                return
        self._begin(json.loads((folder / STATE_FILE).read_text())["step"])

    def _begin(self, step: int) -> None:
        digest = hashlib.sha256(f"{self.seed} {self.rank} {step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8]))  # seeds the GPUs' generators too
        random.seed(digest)
        np.random.seed(int.from_bytes(digest[:4]))

    def _file(self, folder: Path) -> Path:
        return folder / FOLDER / f"rank_{self.rank:04d}.pt"


def _states() -> dict[str, Any]:
    """Tensors and plain values only, as `torch.load(weights_only=True)` requires."""
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(words, np.ndarray)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, words, *rest = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
