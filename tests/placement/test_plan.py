"""Which role sits on which slot, by hand, and the arithmetic that a too small cluster is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.placement.plan import PlacementSpec, plan_placement, shortfall
from tests.samples import make_config

REPOSITORY = Path(__file__).parents[2]
FUNCTION = {"type": "function", "function": "rewards:length"}
TRAIN = {"num_steps": 1, "num_workers": 2}


def model_source(num_replicas: int = 1) -> dict[str, Any]:
    return {"type": "model", "path": "models/reward", "num_replicas": num_replicas}


def slots_of(spec: PlacementSpec) -> dict[str, tuple[int, ...]]:
    return {plan.role: plan.slots for plan in spec.roles}


def plan(
    preset: str, sources: list[dict[str, Any]], ref: dict[str, Any] | None = None, **placement: Any
) -> PlacementSpec:
    return plan_placement(
        make_config(
            train=TRAIN,
            rollout={"num_engines": 3},
            reward={"sources": sources},
            placement={"preset": preset, **placement},
            **({"ref": ref} if ref is not None else {}),
        )
    )


def test_disaggregated_gives_every_unit_a_slot_of_its_own() -> None:
    spec = plan(
        "disaggregated",
        [FUNCTION, model_source(2)],
        ref={"location": "serve", "num_replicas": 2},
        cpus_per_slot=1.5,
    )
    assert slots_of(spec) == {"trainer": (0, 1), "rollout": (2, 3, 4), "ref": (5, 6), "reward:1": (7, 8)}
    assert [plan.gpu_share for plan in spec.roles] == [1.0] * 4
    assert (spec.preset, spec.num_slots, spec.total_cpus) == ("disaggregated", 9, 13.5)


def test_colocate_all_puts_every_role_on_the_same_slots() -> None:
    spec = plan("colocate_all", [model_source(2), FUNCTION], ref={"location": "serve"})
    assert slots_of(spec) == {"trainer": (0, 1), "rollout": (0, 1, 2), "ref": (0,), "reward:0": (0, 1)}
    assert spec.num_slots == 3, "as many as the role with the most units"
    assert {plan.role: plan.gpu_share for plan in spec.roles} == {
        "trainer": 0.5,
        "rollout": 0.3,
        "ref": 0.1,
        "reward:0": 0.1,
    }


@pytest.mark.parametrize("preset", ["disaggregated", "colocate_all"])
def test_what_needs_no_device_has_no_slot(preset: str) -> None:
    """Function rewards, and a reference that lives in the training workers."""
    assert set(slots_of(plan(preset, [FUNCTION]))) == {"trainer", "rollout"}


def test_without_a_kl_term_there_is_no_reference() -> None:
    spec = plan_placement(make_config(algorithm={"kl_coef": 0.0}))
    assert slots_of(spec) == {"trainer": (0,), "rollout": (1,)}


@pytest.mark.parametrize("preset", ["disaggregated", "colocate_all"])
@pytest.mark.parametrize("num_models", [0, 1, 2, 3, 6, 7, 13])
def test_all_roles_of_a_slot_fit_on_its_gpu(preset: str, num_models: int) -> None:
    sources = [FUNCTION, *[model_source(1 + i % 2) for i in range(num_models)]]
    spec = plan(preset, sources, ref={"location": "serve", "num_replicas": 2})
    assert len(spec.roles) == 3 + num_models
    for slot in range(spec.num_slots):
        shares = [plan.gpu_share for plan in spec.roles if slot in plan.slots]
        assert shares and min(shares) > 0
        # Ray counts in ten-thousandths of a GPU and rounds each request to them.
        assert sum(round(share * 10_000) for share in shares) <= 10_000


def test_a_role_is_found_by_name() -> None:
    spec = plan("disaggregated", [FUNCTION])
    assert spec.of("rollout").slots == (2, 3, 4)


@pytest.fixture
def nine_slots() -> PlacementSpec:
    return PlacementSpec("disaggregated", num_slots=9, cpus_per_slot=1.5, roles=())


@pytest.mark.parametrize(
    "total, free, sentence",
    [
        (
            {"CPU": 8.0, "GPU": 16.0},
            {"CPU": 8.0, "GPU": 16.0},
            "needs 14 CPU (9 slots x 1.5 + 0.5 for Ray Data) but the cluster has 8",
        ),
        (
            {"CPU": 64.0, "GPU": 16.0},
            {"CPU": 13.5, "GPU": 16.0},
            "needs 14 CPU (9 slots x 1.5 + 0.5 for Ray Data) but the cluster has free 13.5",
        ),
        (
            {"CPU": 14.0, "GPU": 8.0},
            {"CPU": 14.0, "GPU": 8.0},
            "needs 9 GPU (9 slots x 1) but the cluster has 8",
        ),
        ({"CPU": 14.0}, {"CPU": 14.0}, "needs 9 GPU (9 slots x 1) but the cluster has 0"),
        (
            {"CPU": 14.0, "GPU": 9.0},
            {"CPU": 14.0, "GPU": 7.5},
            "needs 9 GPU (9 slots x 1) but the cluster has free 7.5",
        ),
        # Ray leaves out a resource of which nothing is free.
        ({"CPU": 14.0, "GPU": 9.0}, {"CPU": 14.0}, "needs 9 GPU (9 slots x 1) but the cluster has free 0"),
        ({"CPU": 14.0, "GPU": 9.0}, {"CPU": 14.0, "GPU": 9.0}, None),
    ],
)
def test_what_is_missing_is_told_with_the_arithmetic(
    nine_slots: PlacementSpec, total: dict[str, float], free: dict[str, float], sentence: str | None
) -> None:
    assert shortfall(nine_slots, total=total, free=free, gpus_per_slot=1) == sentence


def test_a_run_on_cpus_wants_no_gpu(nine_slots: PlacementSpec) -> None:
    assert shortfall(nine_slots, total={"CPU": 14.0}, free={"CPU": 14.0}, gpus_per_slot=0) is None


def test_rounding_is_no_shortfall() -> None:
    spec = PlacementSpec("disaggregated", num_slots=3, cpus_per_slot=1.1, roles=())
    assert 3 * 1.1 + 0.5 > 3.8, "in floating point"
    assert shortfall(spec, total={"CPU": 3.8}, free={"CPU": 3.8}, gpus_per_slot=0) is None


def test_planning_imports_nothing_heavy() -> None:
    imports = "import json, sys, rayrlhf.placement.plan, rayrlhf.config.load"
    code = f"{imports}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout)
    assert "rayrlhf.config.run" in modules
    heavy = {"torch", "ray", "numpy", "transformers", "pyarrow"}
    assert not heavy & {name.partition(".")[0] for name in modules}
