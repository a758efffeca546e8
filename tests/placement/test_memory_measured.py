"""The planner's bytes are within 10 % of what torch's allocator counts, on shapes it was not derived from."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.planner import ALLOWED, CASES, SHAPES, in_a_process_of_its_own, off_by

SMALL = [index for index, case in enumerate(CASES) if case[0] in SHAPES and case[3]]  # with checkpointing
WHOLE = [index for index in SMALL if CASES[index][4] == "all"]
LORA, QLORA = (next(index for index in SMALL if CASES[index][4] == kind) for kind in ("LoRA", "QLoRA"))
KINDS = ("weights and optimizer", "gradients", "activations", "peak")


def cases() -> list[Any]:
    chosen = [*WHOLE, LORA, QLORA]
    return [
        pytest.param(
            index,
            marks=[] if index == QLORA else [pytest.mark.long],
            id=f"{CASES[index][0]}, {CASES[index][4]}",
        )
        for index in chosen
    ]


@pytest.mark.slow
@pytest.mark.parametrize("index", cases())
def test_within_ten_percent(index: int) -> None:
    row = in_a_process_of_its_own(index)
    assert row["parameters"]["predicted"] == row["parameters"]["measured"]
    for kind in KINDS:
        assert abs(off_by(row, kind)) < ALLOWED, (kind, row[kind])
