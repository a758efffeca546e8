"""What a node's NVIDIA driver says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayrlhf.placement.slots import PlacementError, _uuid


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def write(driver: Path, body: str) -> None:
    driver.write_text(f"#!/bin/sh\n{body}\n")
    driver.chmod(0o755)


def test_a_gpus_uuid(driver: Path) -> None:
    write(driver, '[ "$1" = --id=3 ] && echo GPU-7')
    assert _uuid("3") == "GPU-7"


def test_a_driver_that_fails_is_no_cpu(driver: Path) -> None:
    """Without a UUID the run would compute on the CPUs of a GPU node."""
    write(driver, 'echo "Unable to determine the device handle" >&2; exit 15')
    with pytest.raises(PlacementError, match=r"nvidia-smi --id=0 .* failed on .*: Unable to determine"):
        _uuid("0")


def test_a_node_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert _uuid("0") is None
