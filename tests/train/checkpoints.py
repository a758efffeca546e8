"""Checkpoints on disk, as a run leaves them, without a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rayrlhf.storage.folder import LocalFolder
from rayrlhf.train import manifest
from rayrlhf.train.checkpoint import ELSEWHERE, STATE_FILE, LoopState, checkpoint_name
from rayrlhf.train.find import search, write_record


def leave_checkpoint(
    storage: Path,
    step: int,
    fixed: Any = None,
    *,
    elsewhere: tuple[str, ...] = (),
    first: str = "first_prompt_batch",
) -> Path:
    """A whole one, and Ray Train's record of all that are there. `first`: what its version calls this."""
    own = storage.parent / "scratch" / "rank-0"
    engine = own / "actor" / "engine"
    engine.mkdir(parents=True)
    state = asdict(LoopState(step=step, first_prompt_batch=step))
    state[first] = state.pop("first_prompt_batch")
    (own / STATE_FILE).write_text(json.dumps(state))
    (own / "actor" / "layout.json").write_text(json.dumps({"workers": 1, "zero_stage": 0, "frozen": {}}))
    torch.save({"module": {"weight": torch.full((400_000,), float(step))}}, engine / "model_states.pt")
    metrics = {"step": step, first: step, "fixed": fixed if fixed is not None else {}}
    folder = storage / checkpoint_name(step)
    manifest.commit(own, LocalFolder(folder), {"metrics": metrics, ELSEWHERE: list(elsewhere)})
    write_record(LocalFolder(storage), search(LocalFolder(storage)))
    return folder


def cut(path: Path, num_bytes: int | None = None) -> None:
    """The end of the file is lost."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if num_bytes is None else num_bytes])
