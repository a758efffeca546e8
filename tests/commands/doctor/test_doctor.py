"""The command as a user meets it; two processes really add up, and a Ray really starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.commands.doctor.probes import check_collective

REPOSITORY = Path(__file__).parents[3]


def doctor(*words: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "rayrlhf.commands.cli", "doctor", "--json", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_two_processes_add_up() -> None:
    [found] = check_collective()
    assert found.status == "ok", found


def test_every_line_that_is_not_in_order_has_a_fix(tmp_path: Path) -> None:
    code, findings = doctor("--no-ray", "--path", str(tmp_path))
    assert code == int(any(finding["status"] == "fail" for finding in findings))
    assert {"python", "packages", "memory", "shared memory", "two processes"} <= {f["name"] for f in findings}
    assert all(finding["fix"] for finding in findings if finding["status"] != "ok")
    assert "ray" not in {finding["name"] for finding in findings}


@pytest.mark.ray
def test_a_tiny_ray_starts_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _, findings = doctor()
    [found] = [finding for finding in findings if finding["name"] == "ray"]
    assert found["status"] == "ok" and "a local Ray: 1 node, 1 CPUs" in found["found"]


@pytest.mark.ray
def test_a_missing_cluster_is_reported(tmp_path: Path) -> None:
    code, findings = doctor("--address", "127.0.0.1:1")
    [found] = [finding for finding in findings if finding["name"] == "ray"]
    assert code == 1 and found["status"] == "fail" and found["fix"]
