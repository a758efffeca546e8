"""Images from data files to a trained policy: the engine reads the same tokens and images as the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_vision import make_tiny_vision

START_SECONDS = 180


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_log_probs_of_engine_and_trainer_agree_after_pushes(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_vision(tmp_path / "model", tied=tied)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.vision_probe", folder],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 and max(found) < 1e-4, found
