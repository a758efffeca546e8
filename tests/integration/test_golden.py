"""Recorded numbers of every kind of run: what is not meant to change them must not.

`GOLDEN=record` writes them (tests/integration/golden/) in place of the comparison: in a separate commit,
which says why they changed. `GOLDEN=exact` compares to the bit, as holds on one machine; else the responses
are the same and numbers differ by 1e-6.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.integration.golden_runs import NAMES, fingerprint

RECORDS = Path(__file__).parent / "golden"
MODE = os.environ.get("GOLDEN", "close")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_session")]


def without_engine_rounding(record: dict[str, Any]) -> dict[str, Any]:
    """An engine's log-probabilities differ in the last bit with the requests that share its step; where no
    rollout correction is set they reach these metrics alone.
    """
    kept = [
        {k: v for k, v in step.items() if not k.startswith("loss/is_weight")} for step in record["metrics"]
    ]
    return {**record, "metrics": kept}


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_the_recorded_ones(name: str, tmp_path: Path, tiny_model: str) -> None:
    file = RECORDS / f"{name}.json"
    if MODE != "record" and not file.is_file():
        pytest.skip(f"{name} is not recorded yet: GOLDEN=record")
    found = fingerprint(name, tmp_path, tiny_model)
    if MODE == "record":
        file.write_text(json.dumps(found, indent=1) + "\n")
        return
    recorded = json.loads(file.read_text())
    if MODE == "exact":
        assert without_engine_rounding(found) == without_engine_rounding(recorded)
    assert found["rollouts"] == recorded["rollouts"]
    assert [step.keys() for step in found["metrics"]] == [step.keys() for step in recorded["metrics"]]
    for ours, theirs in zip(found["metrics"], recorded["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
