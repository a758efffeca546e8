"""Makes the plan real: one placement group, probed into a slot table that every role is placed by."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.placement.plan import PlacementSpec, shortfall

RELEASE_SECONDS = 10.0


class PlacementError(RuntimeError):
    """The cluster cannot hold the run; the message says what is missing and what to change."""


@dataclass(frozen=True)
class Slot:
    bundle: int  # index in the placement group
    node: str  # node id
    gpu: str | None  # the GPU's id on its node
    gpu_share: float = 0.0  # what the asking role takes of the GPU

    @property
    def label(self) -> str:
        return f"{self.node[:6]}" + (f":gpu{self.gpu}" if self.gpu is not None else "")


@dataclass(frozen=True)
class Slots:
    """The run's placement group and where each of its bundles is; travels to whoever places something."""

    spec: PlacementSpec
    group: PlacementGroup
    gpus_per_slot: int
    table: tuple[Slot, ...]  # in slot order

    def of(self, role: str, unit: int) -> Slot:
        plan = self.spec.of(role)
        return replace(self.table[plan.slots[unit]], gpu_share=plan.gpu_share * self.gpus_per_slot)

    def remove(self) -> None:
        remove_placement_group(self.group)


def resolve_gpus_per_slot(wanted: int | str) -> int:
    """`placement.gpus_per_slot`: auto means one if the cluster has any GPU."""
    return int(wanted) if wanted != "auto" else int(ray.cluster_resources().get("GPU", 0) > 0)


def check_fits(spec: PlacementSpec, gpus_per_slot: int) -> None:
    """Raises `PlacementError` with the arithmetic; what another run is just giving back gets a moment."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while (problem := _problem(spec, gpus_per_slot)) is not None:
        if "has free" not in problem or time.monotonic() > deadline:
            raise PlacementError(
                f"placement.preset={spec.preset} {problem}. Fix: fewer train.num_workers or "
                "rollout.num_engines, placement.preset=colocate_all, a smaller placement.cpus_per_slot, or a "
                "larger cluster"
            )
        time.sleep(0.5)


def _problem(spec: PlacementSpec, gpus_per_slot: int) -> str | None:
    total: Any = ray.cluster_resources()
    free: Any = ray.available_resources()
    return shortfall(spec, total=total, free=free, gpus_per_slot=gpus_per_slot)


def create_slots(spec: PlacementSpec, *, gpus_per_slot: int, name: str, timeout_seconds: float) -> Slots:
    """Reserve the group and learn which bundle is which device. Raises `PlacementError` at the deadline."""
    bundle: dict[str, float] = {"CPU": spec.cpus_per_slot}
    if gpus_per_slot:
        bundle["GPU"] = gpus_per_slot
    group = placement_group([dict(bundle) for _ in range(spec.num_slots)], strategy="PACK", name=name)
    if not group.wait(timeout_seconds):
        remove_placement_group(group)
        raise PlacementError(
            f"{spec.num_slots} slots of {bundle} were not granted within placement.start_timeout_seconds="
            f"{timeout_seconds:g}: free now {ray.available_resources()}"
        )
    where = [
        _where_am_i.options(
            num_gpus=0.01 if gpus_per_slot else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        ).remote()
        for index in range(spec.num_slots)
    ]
    found = [Slot(index, *place) for index, place in enumerate(ray.get(where, timeout=timeout_seconds))]
    # Neighbouring slots sit on one node, so that tensor-parallel engines and local ranks do too.
    table = tuple(sorted(found, key=lambda slot: (slot.node, slot.gpu or "", slot.bundle)))
    return Slots(spec, group, gpus_per_slot, table)


@ray.remote(num_cpus=0)
def _where_am_i() -> tuple[str, str | None]:
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return context.get_node_id(), gpus[0] if gpus else None


def describe(slots: Slots) -> list[tuple[str, str, str]]:
    """Rows (role, units, slots) for the console."""
    return [
        (
            plan.role,
            str(len(plan.slots)),
            ", ".join(f"{index} ({slots.table[index].label})" for index in plan.slots),
        )
        for plan in slots.spec.roles
    ]
