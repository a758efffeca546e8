"""Assign placement group bundles to slots, so that neighbouring slots are on one node. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayrlhf.placement.plan import PlacementSpec, PoolPlan


class BundleLocation(NamedTuple):
    """Node and GPU of a bundle."""

    node: str
    gpu: str | None
    uuid: str | None = None


def assign_bundles(spec: PlacementSpec, locations: Sequence[BundleLocation]) -> list[int] | None:
    """The bundle of every slot; None if a tensor-parallel unit fits on no node.

    Pools are split into blocks as wide as their widest unit; each block is placed on one node, widest pools
    first. A block goes to the node its pool is already on, otherwise to the node with the best fit; bundles
    of a node are taken in GPU order.
    """
    free: dict[str, list[int]] = {}
    for bundle in sorted(
        range(len(locations)), key=lambda b: (locations[b].node, _number(locations[b].gpu), b)
    ):
        free.setdefault(locations[bundle].node, []).append(bundle)
    assigned = [-1] * spec.num_slots
    for pool in sorted(spec.pools, key=lambda pool: -pool.width):
        node: str | None = None
        for block in _blocks(pool):
            if node is None or len(free[node]) < len(block):
                fitting = [name for name, bundles in free.items() if len(bundles) >= len(block)]
                if not fitting:
                    return None
                wanted = len(pool.slots)
                # The smallest node that holds the whole pool, otherwise the one with the most free bundles.
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
    """Numeric sort key: GPU 10 is after GPU 9."""
    return (int(gpu), "") if gpu is not None and gpu.isdecimal() else (0, gpu or "")
