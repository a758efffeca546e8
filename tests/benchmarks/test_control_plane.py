"""The arithmetic of benchmarks/control_plane, with unit costs of 100 us."""

from __future__ import annotations

import pytest

from benchmarks.control_plane.model import SIZES, Row, by_process, critical_path, rows
from benchmarks.control_plane.report import UNITS

MADE_UP = dict.fromkeys([*UNITS, *(f"balancing_{w}" for w in SIZES)], 1e-4) | {
    "all_reduces_before": 30.0,
    "all_reduces": 20.0,
    "gathers": 4.0,
}


def row(found: list[Row], what: str, process: str) -> Row:
    [one] = [row for row in found if (row.what, row.process) == (what, process)]
    return one


def test_rounds_in_place_of_hops() -> None:
    numbers = row(rows(512, MADE_UP), "numbers and objects between workers", "every worker")
    assert numbers.cpu == pytest.approx((34 * 1022 * 1e-4, 24 * 9 * 1e-4))
    assert numbers.critical == pytest.approx((34 * 1022 * 1.3e-4, 24 * 9 * 1.3e-4)), "30 us per message"


def test_what_one_controller_does_is_limited() -> None:
    found = rows(512, MADE_UP)
    polls = row(found, "polls of the workers", "Train's controller")
    checks = row(found, "health checks", "Serve's controller")
    assert polls.cpu == pytest.approx((512 * 600 * 1e-4, 50 * 60 * 1e-4))
    assert checks.cpu == pytest.approx((512 * 30 * 1e-4, 50 * 60 * 1e-4))


def test_a_request_per_group_and_a_store_per_node() -> None:
    found = rows(512, MADE_UP)
    assert row(found, "reward requests", "every worker").cpu == pytest.approx((256 * 1e-4, 32 * 1e-4))
    of_push = row(found, "store of a push by IPC", "worker 0, or one per node")
    assert of_push.cpu == pytest.approx((512 * 10_000 * 1e-4, 8 * 120 * 1e-4))
    assert of_push.critical == pytest.approx((512 - 5, 0.0)), "what exceeds the push of 5 s"


def test_sums_leave_out_the_separate_critic_and_give_worker_0_its_share() -> None:
    found = rows(64, MADE_UP)
    others = [r.critical[1] for r in found if "critic" not in r.what]
    assert critical_path(found, 1) == pytest.approx(sum(others))
    processes = by_process(found, 1)
    own = [r.cpu[1] for r in found if r.process == "every worker" or r.process.startswith("worker 0")]
    assert processes["worker 0"] == pytest.approx(sum(own))
    assert "the channel" not in processes and "every worker" not in processes
