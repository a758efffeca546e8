"""The random numbers of a rank: its own masks of dropout, which go on where a checkpoint was saved."""

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

    Models begin alike on all ranks. Then each rank draws numbers of its own: with the same ones on all, every
    rank would drop the same places of its tokens. Neighbours that share a sequence hold other tokens each, so
    theirs differ too.
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
        """Where another number of ranks has saved, or a version that kept no states, this rank begins with
        numbers that are of the checkpoint's step.
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
        torch.manual_seed(int.from_bytes(digest[:8]))  # of the GPUs too
        random.seed(digest)
        np.random.seed(int.from_bytes(digest[:4]))

    def _file(self, folder: Path) -> Path:
        return folder / FOLDER / f"rank_{self.rank:04d}.pt"


def _states() -> dict[str, Any]:
    """Tensors and plain values: what `torch.load` opens with `weights_only`."""
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
