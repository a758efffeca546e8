"""Requests that keep their cache over a push (tests/rollout/keep_probe.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_running_requests_go_on_with_what_the_old_weights_computed() -> None:
    command = [sys.executable, "-m", "tests.rollout.keep_probe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["kept"] < 400, "the push must arrive in the middle for this test to mean anything"
    assert found["of_old"] and found["goes_on"]
    assert found["differs"], "tokens of old keys and values must differ from those of new ones"
    assert found["new_request"], "a new request shares no prefix with the old weights"
