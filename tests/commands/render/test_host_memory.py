"""A pod gets the host memory of the plan, or the manifest is refused."""

from __future__ import annotations

import pytest

from rayrlhf.capacity.budget import budget_of
from rayrlhf.commands.render.host_memory import bytes_of, check_host_memory, fullest_node
from rayrlhf.config.base import ConfigError
from rayrlhf.config.job_kinds import load_any

BIG = "jobs/configs/ppo-70b-16x-a100-80.yaml"
GIB = 2**30
# 70.55e9 parameters of the actor and 69.5e9 of the critic x 18 bytes over 16 slots, 8 of them on a node; the
# actor's weights in bf16 twice on the first one.
STATES = (70.55e9 + 69.5e9) * 18 / 2
PUBLISHED = 70.55e9 * 2


def test_amounts() -> None:
    assert [bytes_of(each) for each in ("3Mi", "2Gi", "1Ti")] == [3 * 2**20, 2 * 2**30, 2**40]


def test_the_first_trainers_node_is_the_fullest() -> None:
    budget = budget_of(load_any([BIG, "placement.gpus_per_slot=1"]))
    needed, slots = fullest_node(budget, per_node=8)
    assert slots == 8
    assert needed == pytest.approx(STATES + 2 * PUBLISHED, rel=0.002)
    other = sum(budget.host_bytes[8:])
    assert other == pytest.approx(STATES, rel=0.002), "no weights are published there"


def test_less_than_the_plan_is_refused() -> None:
    check_host_memory(load_any([BIG]))
    with pytest.raises(ConfigError) as refused:
        check_host_memory(load_any([BIG, "launch.memory_per_node=1Ti", "launch.shared_memory=128Gi"]))
    memory, shared = refused.value.problems
    assert memory.path == "launch.memory_per_node" and memory.got == "1Ti"
    wanted = (STATES + 2 * PUBLISHED) / GIB + 8 * 6
    assert memory.wanted.startswith(f"at least {int(wanted) // 10}"), (memory.wanted, wanted)
    assert shared.path == "launch.shared_memory" and "at least 263Gi" in shared.wanted


def test_a_model_of_unknown_shape_is_not_judged() -> None:
    check_host_memory(load_any([BIG, "model.path=owner/unknown", "launch.memory_per_node=1Gi"]))


def test_states_of_sleeping_trainers_are_in_host_memory() -> None:
    """Llama-3-8B on 4 trainers: 12 bytes a parameter of the actor (ZeRO-3) while engines work."""
    words = ["jobs/configs/grpo-8x-gpu.yaml", "placement.gpus_per_slot=1", "rollout.num_engines=4"]
    apart = budget_of(load_any([*words, "placement.preset=disaggregated"]))
    shared = budget_of(load_any([*words, "placement.preset=colocate_all"]))
    assert "sleeping states" not in apart.roles["actor"].host
    assert shared.roles["actor"].host["sleeping states"] == shared.roles["actor"].device["optimizer"] > 0


def test_weights_that_leave_between_are_in_host_memory() -> None:
    """And no longer on a GPU during rollouts: those of the actor and of the reference in its workers."""
    words = ["jobs/configs/grpo-8x-gpu.yaml", "placement.gpus_per_slot=1", "rollout.num_engines=4"]
    words += ["placement.preset=colocate_all", "train.zero_stage=2", "train.grad_accum_dtype=weights"]
    stay, leave = (
        budget_of(load_any([*words, f"train.offload_weights_between={value}"])) for value in ("false", "true")
    )
    actor = leave.roles["actor"]
    weights = actor.device["weights"]
    assert weights > 2 * 15e9, "two models of 8 billion parameters in bf16"
    assert actor.host["sleeping states"] - stay.roles["actor"].host["sleeping states"] == weights
    changes = {
        phase: [a - b for a, b in zip(sizes, leave.phases[phase], strict=True)]
        for phase, sizes in stay.phases.items()
    }
    assert changes == {"training": [0] * 4, "weight sync": [0] * 4, "rollout": [weights] * 4}
