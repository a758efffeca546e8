"""Pushes into an engine of two workers leave every tensor as loading would (tensor_parallel_probe.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_families import make_family

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_push_is_what_loading_would_have_been(family: str, tmp_path: Path) -> None:
    folders = [make_family(tmp_path / f"{family}-{seed}", family, seed=seed) for seed in (0, 1)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.tensor_parallel_probe", *folders],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(family, found)
    assert found.pop("workers") == 2 and found.pop("tensors") > 10
    assert all(found.values()), found
