"""Assignment of bundles to slots, with hand-derived expectations."""

from __future__ import annotations

import pytest

from rayrlhf.config.placement import PlacementConfig
from rayrlhf.placement.assign import BundleLocation, assign_bundles
from rayrlhf.placement.plan import PlacementSpec, Units, place


def locations(*places: str) -> list[BundleLocation]:
    """`a1` is GPU 1 of node a."""
    return [BundleLocation(place[0], place[1:] or None) for place in places]


def where(spec: PlacementSpec, bundles: list[BundleLocation]) -> list[str]:
    assigned = assign_bundles(spec, bundles)
    assert assigned is not None
    assert sorted(assigned) == list(range(len(bundles))), "every bundle is one slot"
    return [bundles[b].node + (bundles[b].gpu or "") for b in assigned]


def spec(*units: tuple[int, int]) -> PlacementSpec:
    """Pools of (count, width) units."""
    return place({f"rollout:{i}": Units(*unit) for i, unit in enumerate(units)}, PlacementConfig())


def test_slots_are_in_node_and_gpu_order() -> None:
    bundles = locations("b10", "a1", "b9", "a0")
    assert where(spec((4, 1)), bundles) == ["a0", "a1", "b9", "b10"]


def test_a_pool_is_placed_on_the_node_it_fills() -> None:
    """Node a has room for both pools, but the small pool fits b exactly."""
    bundles = locations("a0", "a1", "a2", "b0", "b1")
    assert where(spec((2, 1), (3, 1)), bundles) == ["b0", "b1", "a0", "a1", "a2"]


def test_tensor_parallel_units_stay_on_one_node() -> None:
    """Taken one by one, the three workers would leave two halves of an engine on two nodes."""
    bundles = locations("a0", "a1", "a2", "a3", "b0", "b1", "b2")
    assert where(spec((3, 1), (2, 2)), bundles) == ["b0", "b1", "b2", "a0", "a1", "a2", "a3"]


def test_units_of_one_pool_may_be_on_several_nodes() -> None:
    bundles = locations("a0", "a1", "b0", "b1")
    assert where(spec((2, 2)), bundles) == ["a0", "a1", "b0", "b1"]


def test_without_gpus() -> None:
    assert where(spec((2, 1)), locations("a", "a")) == ["a", "a"]


@pytest.mark.parametrize("nodes", [("a0", "a1", "b0", "b1"), ("a0", "b0", "c0", "d0")])
def test_a_unit_that_fits_on_no_node_is_reported(nodes: tuple[str, ...]) -> None:
    assert assign_bundles(spec((1, 4)), locations(*nodes)) is None
