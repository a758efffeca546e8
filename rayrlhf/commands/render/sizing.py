"""How many nodes a job needs, from its plan. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.launch import LaunchConfig
from rayrlhf.config.serve_reward import ServedModel, ServeRewardConfig
from rayrlhf.placement.plan import PlacementSpec, Units, place, plan_job, slots_in_words


@dataclass(frozen=True)
class Nodes:
    """The machines that hold the slots, all alike; the head is an additional machine without slots."""

    count: int
    cpus: int
    gpus: int
    memory: str
    num_slots: int
    assumed: str  # what was assumed where the config leaves it open


def nodes_of(config: Any) -> Nodes:
    """Raises `ConfigError` for slots that no node can hold."""
    launch: LaunchConfig = config.launch
    wanted = config.placement.gpus_per_slot
    on_gpu = wanted == 1 or (wanted == "auto" and launch.gpus_per_node > 0)
    assumed = ""
    if wanted == "auto":
        each = "a GPU" if on_gpu else "no GPU"
        assumed = (
            f"placement.gpus_per_slot=auto: {each} per slot, as launch.gpus_per_node={launch.gpus_per_node}"
        )
    if wanted == 1 and launch.gpus_per_node == 0:
        problem = Problem(
            "launch.gpus_per_node",
            got="0 with placement.gpus_per_slot=1",
            wanted="GPUs: every slot needs one",
            fix="set launch.gpus_per_node, or placement.gpus_per_slot to 0",
        )
        raise ConfigError([problem])
    specs = [plan_job(part) for part in parts_of(config)] or [_served_models(config)]
    per_node = min(slots_of_a_node(spec, launch, on_gpu=on_gpu) for spec in specs)
    num_slots = max(spec.num_slots for spec in specs)
    return Nodes(
        count=math.ceil(num_slots / per_node),
        cpus=launch.cpus_per_node,
        gpus=launch.gpus_per_node if on_gpu else 0,
        memory=launch.memory_per_node,
        num_slots=num_slots,
        assumed=assumed,
    )


def parts_of(config: Any) -> list[Any]:
    """The jobs that need slots one after the other: the stages of a chain, or the job itself."""
    if isinstance(config, ServeRewardConfig):
        return []
    if hasattr(config, "generate_config"):
        path = config.model.path
        return [config.generate_config(1, path), config.training_config(1, path)]
    return [config]


def _served_models(config: ServeRewardConfig) -> PlacementSpec:
    units = {
        f"reward:{index}": Units(source.num_replicas)
        for index, source in enumerate(config.reward.sources)
        if isinstance(source, ServedModel)
    }
    return place(units or {"score": Units(1)}, config.placement)


def slots_of_a_node(spec: PlacementSpec, launch: LaunchConfig, *, on_gpu: bool) -> int:
    by_cpu = int(launch.cpus_per_node // spec.cpus_per_slot)
    slots = min(by_cpu, launch.gpus_per_node) if on_gpu else by_cpu
    widest = max(plan.width for plan in spec.roles)
    if slots >= widest:
        return slots
    problem = Problem(
        "launch.cpus_per_node",
        got=f"{launch.cpus_per_node} CPUs and {launch.gpus_per_node} GPUs a node",
        wanted=f"room for {slots_in_words(widest)} of {spec.cpus_per_slot:g} CPUs"
        + (" and a GPU" if on_gpu else ""),
        fix="larger nodes, a smaller placement.cpus_per_slot or a smaller rollout.tensor_parallel",
    )
    raise ConfigError([problem])
