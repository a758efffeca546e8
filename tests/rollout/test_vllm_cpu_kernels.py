"""Packed products and fused norms of vLLM's CPU worker (tests/rollout/cpu_kernels_probe.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.rollout.cpu_kernels_probe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_packed_products_equal_torch(probed: dict[str, Any]) -> None:
    assert max(probed["errors"]) < 1e-4
    assert probed["unpacked stays"]


def test_a_reset_brings_changed_weights(probed: dict[str, Any]) -> None:
    """Also to a layer whose weight is another layer's, which vLLM does not process again."""
    assert probed["stale"] > 1, "the weights must differ for this test to mean anything"
    assert max(probed["after"]) < 1e-4


def test_only_layers_that_were_used_have_a_copy(probed: dict[str, Any]) -> None:
    assert probed["freed"] == [0, 2 * probed["one"]]


def test_rounded_products_are_off_by_the_rounding_of_their_factors_and_output(probed: dict[str, Any]) -> None:
    found = probed["rounded"]
    if found is None:
        pytest.skip("this CPU has no bf16 units")
    assert found["error"] < 2**-8 and found["dtype"] == "torch.float32"  # of the output: half of 2^-7
    assert found["halves"]
    assert found["head"], "logits are not rounded"


def test_fused_norms_equal_vllms_own(probed: dict[str, Any]) -> None:
    assert max(probed["norms"]) < 1e-5


def test_rotations_of_mla_are_right(probed: dict[str, Any]) -> None:
    """If the kernel's are right one day, ours can go."""
    assert max(probed["rotations"]["ours"], probed["rotations"]["whole"]) < 1e-5
    assert probed["rotations"]["kernel"] > 0.1
