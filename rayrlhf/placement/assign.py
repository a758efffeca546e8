"""Which bundle of the group becomes which slot: neighbours on one node. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayrlhf.placement.plan import PlacementSpec, PoolPlan


class Found(NamedTuple):
    """Where a bundle is."""

    node: str
    gpu: str | None
    uuid: str | None = None


def assign_bundles(spec: PlacementSpec, found: Sequence[Found]) -> list[int] | None:
    """The bundle of every slot; None where a tensor-parallel unit fits on no node.

    Pools are cut into blocks as wide as their widest unit, which go to one node each, widest first. A block
    goes to the node that its pool is on already, else to the one that it fills best; bundles of a node are
    taken in the order of their GPUs.
    """
    free: dict[str, list[int]] = {}
    for bundle in sorted(range(len(found)), key=lambda b: (found[b].node, _number(found[b].gpu), b)):
        free.setdefault(found[bundle].node, []).append(bundle)
    assigned = [-1] * spec.num_slots
    for pool in sorted(spec.pools, key=lambda pool: -pool.width):
        node: str | None = None
        for block in _blocks(pool):
            if node is None or len(free[node]) < len(block):
                fitting = [name for name, bundles in free.items() if len(bundles) >= len(block)]
                if not fitting:
                    return None
                wanted = len(pool.slots)
                # The smallest node that takes the whole pool, else the one with the most room.
                node = min(fitting, key=lambda name: (len(free[name]) < wanted, _room(free[name], wanted)))
            for slot in block:
                assigned[slot] = free[node].pop(0)
    return assigned


def _room(bundles: list[int], wanted: int) -> int:
    return len(bundles) if len(bundles) >= wanted else -len(bundles)


def _blocks(pool: PoolPlan) -> list[tuple[int, ...]]:
    slots, width = pool.slots, pool.width
    return [slots[i : i + width] for i in range(0, len(slots), width)]


def _number(gpu: str | None) -> tuple[int, str]:
    """GPU 10 comes after GPU 9."""
    return (int(gpu), "") if gpu is not None and gpu.isdecimal() else (0, gpu or "")
