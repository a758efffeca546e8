"""The planner's bytes are within 10 % of what torch's allocator counts, on shapes it was not derived from."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.planner import ALLOWED, CASES, SHAPES, Case, in_processes_of_its_own, off_by

# Of the small ones with checkpointing: each shape whole, adapters, adapters on 4 bits or of experts.
# And shared sequences.
SMALL = [case for case in CASES if case.name in SHAPES and case.checkpointing]
WHOLE = [case for case in SMALL if case.trained == "all"]
SHARED = next(case for case in CASES if case.ranks > 1)
LORA, QLORA, EXPERTS = (
    next(case for case in SMALL if case.trained == kind) for kind in ("LoRA", "QLoRA", "LoRA and experts")
)
KINDS = ("weights and optimizer", "gradients", "activations", "peak")


def cases() -> list[Any]:
    return [
        pytest.param(case, marks=[] if case == QLORA else [pytest.mark.long], id=str(case))
        for case in (*WHOLE, SHARED, LORA, QLORA, EXPERTS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_within_ten_percent(case: Case) -> None:
    row = in_processes_of_its_own(case)
    assert row["parameters"]["predicted"] == row["parameters"]["measured"]
    for kind in KINDS:
        assert abs(off_by(row, kind)) < ALLOWED, (kind, row[kind])
