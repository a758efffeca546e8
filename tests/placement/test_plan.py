"""Slots of each role, with hand-derived expectations, and the error of a cluster that is too small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.placement import PRESETS, PlacementConfig
from rayrlhf.placement.plan import PlacementSpec, Units, place, plan_placement, shortfall
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
    """2 actor workers, 2 critic workers if the critic is separate, 3 engines."""
    return plan_placement(
        make_config(
            train=TRAIN,
            rollout={"num_engines": 3},
            reward={"sources": sources},
            placement={"preset": preset, **placement},
            **({"ref": ref} if ref is not None else {}),
        )
    )


TWO_MODELS = [FUNCTION, model_source(2), model_source(1)]  # reward:1 and reward:2


@pytest.mark.parametrize(
    "preset, slots",
    [
        (
            "disaggregated",
            {
                "actor": (0, 1),
                "critic": (2, 3),
                "rollout": (4, 5, 6),
                "ref": (7,),
                "reward:1": (8, 9),
                "reward:2": (10,),
            },
        ),
        (
            "colocate_actor_ref",
            {
                "actor": (0, 1),
                "critic": (2, 3),
                "rollout": (4, 5, 6),
                "reward:1": (7, 8),
                "reward:2": (9,),
            },
        ),
        (
            "colocate_critic_reward",
            {
                "actor": (0, 1),
                "critic": (2, 3),
                "reward:1": (2, 3),
                "reward:2": (2,),
                "rollout": (4, 5, 6),
                "ref": (7,),
            },
        ),
        (
            "colocate_actor_ref+critic_reward",
            {
                "actor": (0, 1),
                "critic": (2, 3),
                "reward:1": (2, 3),
                "reward:2": (2,),
                "rollout": (4, 5, 6),
            },
        ),
        (
            "colocate_all",
            {"actor": (0, 1), "rollout": (0, 1, 2), "reward:1": (0, 1), "reward:2": (0,)},
        ),
    ],
)
def test_slots_of_every_preset(preset: str, slots: dict[str, tuple[int, ...]]) -> None:
    spec = plan(preset, TWO_MODELS, cpus_per_slot=1.5)
    assert slots_of(spec) == slots
    assert spec.num_slots == 1 + max(slot for taken in slots.values() for slot in taken)
    assert spec.total_cpus == 1.5 * spec.num_slots


def test_pools_by_hand() -> None:
    pools = [
        {"name": "policy", "roles": ["actor", "critic", "rollout"], "slots": 4},
        {"name": "judges", "roles": ["reward", "ref"]},
    ]
    spec = plan("pools", TWO_MODELS, ref={"num_replicas": 3}, pools=pools)
    assert slots_of(spec) == {
        "actor": (0, 1),
        "rollout": (0, 1, 2),
        "ref": (4, 5, 6),
        "reward:1": (4, 5),
        "reward:2": (4,),
    }
    assert [(pool.name, len(pool.slots)) for pool in spec.pools] == [("policy", 4), ("judges", 3)]


def test_a_pool_may_have_the_name_of_a_role_that_is_not_in_it() -> None:
    pools = [{"name": "rollout", "roles": ["actor", "critic", "ref"]}]
    assert slots_of(plan("pools", [FUNCTION], pools=pools)) == {"actor": (0, 1), "rollout": (2, 3, 4)}


def test_a_pool_that_is_too_small_is_refused_with_the_arithmetic() -> None:
    pools = [{"name": "all", "roles": ["actor", "rollout"], "slots": 2}]
    with pytest.raises(ConfigError) as refused:
        plan("pools", [FUNCTION], pools=pools)
    [problem] = refused.value.problems
    assert problem.got == "pool all with 2 slots"
    assert problem.wanted == "at least 3: actor 2 slots, rollout 3 slots"


def test_tensor_parallel_engines_span_neighbours() -> None:
    config = make_config(
        train=TRAIN, rollout={"num_engines": 2, "tensor_parallel": 2}, placement={"preset": "colocate_all"}
    )
    spec = plan_placement(config)
    assert spec.of("rollout").units == ((0, 1), (2, 3))
    assert spec.of("actor").units == ((0,), (1,))
    assert spec.num_slots == 4


def test_shares_are_by_weight() -> None:
    spec = plan("colocate_all", [model_source(2), FUNCTION], ref={"location": "serve"})
    assert {plan.role: plan.gpu_share for plan in spec.roles} == {
        "actor": 0.5,
        "rollout": 0.3,
        "ref": 0.1,
        "reward:0": 0.1,
    }


@pytest.mark.parametrize("preset", ["disaggregated", "colocate_all"])
def test_roles_without_a_device_have_no_slot(preset: str) -> None:
    """Function rewards, and roles inside the actor's workers."""
    config = make_config(
        critic={"location": "worker"}, ref={"location": "worker"}, placement={"preset": preset}
    )
    assert set(slots_of(plan_placement(config))) == {"actor", "rollout"}


def test_without_a_kl_term_there_is_no_reference() -> None:
    spec = plan_placement(make_config(algorithm={"kl_coef": 0.0}))
    assert slots_of(spec) == {"actor": (0,), "critic": (1,), "rollout": (2,)}


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("num_models", [0, 1, 2, 3, 6, 7, 13])
def test_all_roles_of_a_slot_fit_on_its_gpu(preset: str, num_models: int) -> None:
    sources = [FUNCTION, *[model_source(1 + i % 2) for i in range(num_models)]]
    spec = plan(preset, sources, ref={"location": "serve", "num_replicas": 2})
    for slot in range(spec.num_slots):
        shares = [plan.gpu_share for plan in spec.roles for unit in plan.units if slot in unit]
        assert shares and min(shares) > 0
        # Ray counts in ten-thousandths of a GPU and rounds each request to them.
        assert sum(round(share * 10_000) for share in shares) <= 10_000


@pytest.mark.parametrize(
    "roles, sleep",
    [(["actor", "rollout"], True), (["critic", "rollout"], True), (["reward", "rollout"], False)],
)
def test_engines_sleep_where_a_trainer_needs_their_memory(roles: list[str], sleep: bool) -> None:
    placement = {"preset": "pools", "pools": [{"name": "a", "roles": roles}]}
    assert make_config(placement=placement).engines_sleep(on_gpu=True) is sleep
    assert not make_config(placement=placement, rollout={"max_staleness": 1}).engines_sleep(on_gpu=True)


def test_a_role_is_found_by_name() -> None:
    spec = plan("colocate_actor_ref", [FUNCTION])
    assert spec.of("rollout").slots == (4, 5, 6)


def slots_spec(num_slots: int = 9, cpus_per_slot: float = 1.5) -> PlacementSpec:
    return place({"rollout": Units(num_slots)}, PlacementConfig(cpus_per_slot=cpus_per_slot))


@pytest.fixture
def nine_slots() -> PlacementSpec:
    return slots_spec()


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
        # Ray omits a resource of which nothing is free.
        ({"CPU": 14.0, "GPU": 9.0}, {"CPU": 14.0}, "needs 9 GPU (9 slots x 1) but the cluster has free 0"),
        ({"CPU": 14.0, "GPU": 9.0}, {"CPU": 14.0, "GPU": 9.0}, None),
    ],
)
def test_a_shortfall_is_reported_with_the_arithmetic(
    nine_slots: PlacementSpec, total: dict[str, float], free: dict[str, float], sentence: str | None
) -> None:
    assert shortfall(nine_slots, total=total, free=free, gpus_per_slot=1) == sentence


def test_one_slot_is_singular() -> None:
    message = shortfall(slots_spec(1), total={"CPU": 2.0, "GPU": 1.0}, free={"CPU": 2.0}, gpus_per_slot=1)
    assert message == "needs 1 GPU (1 slot x 1) but the cluster has free 0"


def test_a_run_on_cpus_wants_no_gpu(nine_slots: PlacementSpec) -> None:
    assert shortfall(nine_slots, total={"CPU": 14.0}, free={"CPU": 14.0}, gpus_per_slot=0) is None


def test_rounding_is_no_shortfall() -> None:
    spec = slots_spec(3, cpus_per_slot=1.1)
    assert 3 * 1.1 + 0.5 > 3.8, "in floating point"
    assert shortfall(spec, total={"CPU": 3.8}, free={"CPU": 3.8}, gpus_per_slot=0) is None


def test_planning_imports_nothing_heavy() -> None:
    imports = "import json, sys, rayrlhf.placement.plan, rayrlhf.config.parse"
    code = f"{imports}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout)
    assert "rayrlhf.config.policy" in modules
    heavy = {"torch", "ray", "numpy", "transformers", "pyarrow"}
    assert not heavy & {name.partition(".")[0] for name in modules}
