"""docs/estimators.md is the registry's."""

from __future__ import annotations

from pathlib import Path

from rayrlhf.algorithms.registry import ESTIMATORS, POLICY_LOSSES
from rayrlhf.commands.estimators_page import page

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def test_it_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make rendered`"


def test_it_has_every_estimator_and_loss_with_its_source() -> None:
    lines = page().splitlines()
    for name, entry in (ESTIMATORS | POLICY_LOSSES).items():
        [line] = [line for line in lines if line.startswith(f"| `{name}` ")]
        assert entry.paper in line and entry.summary in line
        assert entry.function.__name__ in line, "the function is there"
