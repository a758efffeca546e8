"""A real engine with a LoRA adapter that it was sent alone (tests/rollout/adapter_probe.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.rollout.adapter_probe import COUNT, WRONG

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of log-probabilities, in fp32


@pytest.fixture(scope="module")
def probed(tiny_model: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.adapter_probe", tiny_model],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_engine_and_trainer_agree_after_every_push(probed: dict[str, Any]) -> None:
    assert len(probed["differences"]) == 3
    assert max(probed["differences"]) < TOLERANCE
    assert min(probed["stale"]) > 0.01, "the adapters must differ for this test to mean anything"


def test_greedy_tokens_are_those_of_merged_weights(probed: dict[str, Any]) -> None:
    (first, expected), (second, expected_then) = probed["greedy 1"], probed["greedy 2"]
    assert first == expected
    assert second == expected_then  # the same prompt: blocks of the old adapter would show
    assert first != second


def test_a_response_continues_with_the_new_adapter(probed: dict[str, Any]) -> None:
    switched = probed["switched"]
    kept = switched["versions"].count(2)
    assert 20 <= kept < COUNT
    assert switched["versions"] == [2] * kept + [3] * (COUNT - kept)
    assert switched["tokens"] == switched["first"] + switched["second"]


def test_the_prefix_cache_tells_adapters_apart(probed: dict[str, Any]) -> None:
    changed = probed["switched"]["block hashes changed"]
    assert len(changed) >= 2 and all(changed)


def test_the_base_can_be_sent_too(probed: dict[str, Any]) -> None:
    """QLoRA's adapters are of other weights than the checkpoint that engines load."""
    assert probed["on another base"] < TOLERANCE


def test_old_adapters_are_gone(probed: dict[str, Any]) -> None:
    assert len(probed["ids"]) == 1
    assert probed["in memory"] == probed["in memory at the end"] == 1


def test_tensors_that_are_not_the_trainers_are_named(probed: dict[str, Any]) -> None:
    assert "1 adapter tensors of the engine differ" in probed["changed on its way"]
    assert WRONG in probed["changed on its way"]
    assert "1 adapter tensors of the engine differ" in probed["held wrongly"]
    assert WRONG in probed["held wrongly"]
    assert "no layer for 4 tensors" in probed["no layer"]
    assert "z_proj" in probed["no layer"] and "rollout.weight_sync.lora to merged" in probed["no layer"]
    assert probed["recovered"] < TOLERANCE
