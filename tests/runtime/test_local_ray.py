"""A Ray that a job starts for itself: on loopback, with a token that only its user can read."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runtime.local_ray import make_token_file, token_file_warnings

SESSION = """
import json, os, sys
import psutil, ray
from rayrlhf.runtime.ray_session import ray_session

with ray_session("test") as where:
    @ray.remote
    class Actor:
        def listens(self):
            return [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]

    actor = Actor.remote()
    listening = ray.get(actor.listens.remote())
    for process in psutil.Process().children(recursive=True):
        try:
            listening += [c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"]
        except psutil.NoSuchProcess:
            continue
    listening += [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    address = ray.get_runtime_context().gcs_address
    unauthorised = os.popen(
        f"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN={chr(48) * 64} "
        f"timeout 60 {sys.executable} -c \\"import ray; ray.init(address='{address}')\\" 2>&1; echo done"
    ).read()
print(json.dumps({"where": where, "listening": listening, "unauthorised": unauthorised}))
"""


def run_session(home: Path, **environment: str) -> dict[str, Any]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    own.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        env=own | {"HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "authentication" not in done.stderr.lower(), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_a_local_ray_is_on_loopback_and_its_token_is_its_users_alone(tmp_path: Path) -> None:
    """Before: every interface, and a token file with mode 644."""
    seen = run_session(tmp_path)
    assert len(seen["listening"]) > 8, "GCS, raylet, agents, workers and the driver"
    assert {ip.removeprefix("::ffff:") for ip in seen["listening"]} == {"127.0.0.1"}
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    assert "uthenticat" in seen["unauthorised"] and "Error" in seen["unauthorised"], (
        "a wrong token is refused"
    )
    assert "warning" not in seen["where"]


def test_a_token_file_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "auth_token"
    make_token_file(path)
    token = path.read_text()
    assert len(token) == 64 and set(token) <= set("0123456789abcdef")
    make_token_file(path)
    assert path.read_text() == token, "who comes second takes the first one's"
    assert token_file_warnings(path) == []
    path.chmod(0o644)
    assert token_file_warnings(path) == [
        f"other users can read Ray's token file (mode 644): chmod 600 {path}"
    ]
