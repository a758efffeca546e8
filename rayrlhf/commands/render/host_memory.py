"""Host memory of a node: what the memory plan needs, against what a manifest gives. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rayrlhf.capacity.budget import PUBLICATIONS, Budget, budget_of
from rayrlhf.capacity.model_shape import ShapeUnknown
from rayrlhf.commands.render.sizing import parts_of, slots_of_a_node
from rayrlhf.config.base import ConfigError, Problem

GIB = 2**30
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
PROCESS_BYTES = 6 * GIB  # of a slot's processes without models: a trainer, an engine, replicas


def bytes_of(quantity: str) -> int:
    """Of Kubernetes' notation, for example 2**40 of "1Ti"."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def check_host_memory(config: Any) -> None:
    """Raises `ConfigError` if a pod would be killed for its memory; models of unknown shape pass."""
    problems = [problem for part in parts_of(config) for problem in _problems(part, config.launch)]
    if problems:
        raise ConfigError(problems)


def _problems(config: Any, launch: Any) -> Iterator[Problem]:
    on_gpu = launch.gpus_per_node > 0 and config.placement.gpus_per_slot != 0
    placement = config.placement.model_copy(update={"gpus_per_slot": int(on_gpu)})
    try:
        budget = budget_of(config.model_copy(update={"placement": placement}))
    except ShapeUnknown:
        return
    per_node = slots_of_a_node(budget.spec, launch, on_gpu=on_gpu)
    states, slots = fullest_node(budget, per_node)
    shared = PUBLICATIONS * budget.published_bytes
    needed = states + slots * PROCESS_BYTES
    if bytes_of(launch.memory_per_node) < needed:
        yield Problem(
            "launch.memory_per_node",
            got=launch.memory_per_node,
            wanted=f"at least {_gib(needed)}: by the plan {_gib(states)} on the fullest node, and "
            f"{_gib(PROCESS_BYTES)} for the processes of each of its {slots} slots",
            fix=f"set it to {_gib(needed)} or more, if the nodes have that, or choose smaller states",
        )
    if bytes_of(launch.shared_memory) < shared:
        yield Problem(
            "launch.shared_memory",
            got=launch.shared_memory,
            wanted=f"at least {_gib(shared)}: the weights in transfer, {PUBLICATIONS} x "
            f"{_gib(budget.published_bytes)}; Ray would spill them to the pod's disk in every step",
            fix=f"set it to {_gib(shared)} or more",
        )


def fullest_node(budget: Budget, per_node: int) -> tuple[int, int]:
    """(host bytes, slots) of the node with the most, when neighbouring slots share nodes."""
    hosts = budget.host_bytes
    nodes = [hosts[first : first + per_node] for first in range(0, len(hosts), per_node)]
    return max((sum(node), len(node)) for node in nodes)


def _gib(size: int) -> str:
    return f"{math.ceil(size / GIB)}Gi"
