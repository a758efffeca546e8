"""Loads checkpoints that were saved with a different world size (DeepSpeed universal checkpoint)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from rayrlhf.train import collectives
from rayrlhf.train.safe_load import only_tensors

LAYOUT = "layout.json"  # world size, ZeRO stage and frozen weights' checksums of a saved checkpoint
TAG = "engine"
SECONDS = 3600.0
POLL_SECONDS = 0.2
DONE, FAILED = "done", "failed"


class Layout(TypedDict):
    workers: int
    zero_stage: int
    frozen: dict[str, int]  # checksums by parameter name
    bad_steps_in_a_row: NotRequired[int]  # absent in earlier versions


def write_layout(folder: Path, zero_stage: int, frozen: dict[str, int], bad_steps_in_a_row: int) -> None:
    layout = Layout(
        workers=collectives.world_size(),
        zero_stage=zero_stage,
        frozen=frozen,
        bad_steps_in_a_row=bad_steps_in_a_row,
    )
    (folder / LAYOUT).write_text(json.dumps(layout))


def read_layout(folder: Path) -> Layout:
    return json.loads((folder / LAYOUT).read_text())


@contextmanager
def resized(folder: Path) -> Iterator[Path]:
    """Convert the engine's checkpoint `folder` to the universal format; yields a temporary folder on this
    node and removes it afterwards. Collective.

    Raises:
        RuntimeError: with DeepSpeed's message, when the conversion fails.
    """
    node = socket.gethostname()
    [(token, _), *_] = members = collectives.gather_lists([(uuid.uuid4().hex[:8], node)])
    leads = [where for _, where in members].index(node) == collectives.rank()
    scratch = Path(tempfile.gettempdir()) / f"rayrlhf-resize-{token}"
    try:
        if leads:
            _convert(folder / TAG, scratch)
        _wait(scratch)
        yield scratch
        collectives.max_over_ranks(0.0)  # barrier: all ranks have read it
    finally:
        if leads:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert(source: Path, scratch: Path) -> None:
    """Run the converter in a separate process, because it forks and prints."""
    scratch.mkdir()
    command = [sys.executable, "-m", "rayrlhf.train.universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(scratch / TAG)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=_env())
        failure = "" if done.returncode == 0 else _last_line(done.stderr)
    except subprocess.TimeoutExpired:
        failure = f"not done within {SECONDS:g} s"
    (scratch / (FAILED if failure else DONE)).write_text(failure)


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _wait(scratch: Path) -> None:
    deadline = time.monotonic() + SECONDS + 60
    while not (scratch / DONE).is_file():
        if (scratch / FAILED).is_file():
            why = (scratch / FAILED).read_text()
            raise RuntimeError(f"the checkpoint of another number of workers could not be converted: {why}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{scratch} was not filled within {SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def load_universal(engine: Any, folder: Path) -> Any:
    """`engine.load_checkpoint` for a folder in the universal format; returns what that returns."""
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, True
    try:
        with only_tensors(folder):
            return engine.load_checkpoint(str(folder), tag=TAG)
    finally:
        config.load_universal_checkpoint = before
