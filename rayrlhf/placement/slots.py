"""Create the run's placement group and the slot table by which every role is placed."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.placement.assign import BundleLocation, assign_bundles
from rayrlhf.placement.plan import PlacementSpec, shortfall, slots_in_words
from rayrlhf.untrusted_text import last_line

RELEASE_SECONDS = 2.5
NVIDIA_SMI_SECONDS = 20.0
PROBE_SECONDS = 60.0


class PlacementError(RuntimeError):
    """The run does not fit on the cluster; the message states what is missing and what to change."""


@dataclass(frozen=True)
class Slot:
    bundle: int  # index in the placement group
    node: str  # node id
    gpu: str | None  # the GPU's number on its node
    gpu_uuid: str | None  # None without an NVIDIA driver, as on a fake cluster
    gpu_share: float = 0.0  # share of the GPU used by the role the slot was looked up for

    @property
    def label(self) -> str:
        return f"{self.node[:6]}" + (f":gpu{self.gpu}" if self.gpu is not None else "")


@dataclass(frozen=True)
class Slots:
    """The run's placement group and the location of its bundles; passed to all that place actors on it."""

    run_id: str
    spec: PlacementSpec
    group: PlacementGroup
    gpus_per_slot: int
    table: tuple[Slot, ...]  # in slot order
    memory_turns: str | None = None  # actor with the turns on shared GPUs (`memory_turns`); None: no turns

    def unit(self, role: str, unit: int) -> tuple[Slot, ...]:
        """The slots of one unit of a role: several for a tensor-parallel engine."""
        plan = self.spec.of(role)
        share = plan.gpu_share * self.gpus_per_slot
        return tuple(replace(self.table[slot], gpu_share=share) for slot in plan.units[unit])

    def of(self, role: str, unit: int) -> Slot:
        """The first slot of a unit."""
        return self.unit(role, unit)[0]

    @property
    def have_gpus(self) -> bool:
        """Whether there are GPUs to compute on; a fake cluster only declares them as resources."""
        return all(slot.gpu_uuid is not None for slot in self.table)

    def remove(self) -> None:
        remove_placement_group(self.group)


def resolve_gpus_per_slot(wanted: int | str) -> int:
    """Resolve `placement.gpus_per_slot`: auto is 1 if the cluster has a GPU, otherwise 0."""
    return int(wanted) if wanted != "auto" else int(ray.cluster_resources().get("GPU", 0) > 0)


def check_fits(spec: PlacementSpec, gpus_per_slot: int) -> None:
    """Raises `PlacementError` with the arithmetic. Waits briefly while another run releases resources."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while (problem := _problem(spec, gpus_per_slot)) is not None:
        if "has free" not in problem or time.monotonic() > deadline:
            raise PlacementError(
                f"placement.preset={spec.preset} {problem}. Fix: fewer train.num_workers or "
                "rollout.num_engines, placement.preset=colocate_all, a smaller placement.cpus_per_slot, or a "
                "larger cluster"
            )
        time.sleep(0.25)


def _problem(spec: PlacementSpec, gpus_per_slot: int) -> str | None:
    total: Any = ray.cluster_resources()
    free: Any = ray.available_resources()
    return shortfall(spec, total=total, free=free, gpus_per_slot=gpus_per_slot)


def create_slots(spec: PlacementSpec, *, gpus_per_slot: int, run_id: str, timeout_seconds: float) -> Slots:
    """Reserve the placement group and locate its bundles. Raises `PlacementError` at the deadline."""
    bundle: dict[str, float] = {"CPU": spec.cpus_per_slot}
    if gpus_per_slot:
        bundle["GPU"] = gpus_per_slot
    group = placement_group([dict(bundle) for _ in range(spec.num_slots)], strategy="PACK", name=run_id)
    try:
        table = _wait_and_probe(spec, group, gpus_per_slot, timeout_seconds)
    except BaseException:
        remove_placement_group(group)
        raise
    return Slots(run_id, spec, group, gpus_per_slot, table)


def _wait_and_probe(
    spec: PlacementSpec, group: PlacementGroup, gpus_per_slot: int, timeout_seconds: float
) -> tuple[Slot, ...]:
    if not group.wait(timeout_seconds):
        raise PlacementError(
            f"{slots_in_words(spec.num_slots)} of {group.bundle_specs[0]} were not granted within "
            f"placement.start_timeout_seconds={timeout_seconds:g}: free now {ray.available_resources()}"
        )
    locations = probe(group, gpus_per_slot, timeout_seconds=timeout_seconds)
    widest = max(plan.width for plan in spec.roles)
    if widest > 1 and any(location.uuid is None for location in locations):
        raise PlacementError(
            f"tensor_parallel={widest} without GPUs: vLLM's CPU build runs an engine in one process. "
            "Fix: remove rollout.tensor_parallel and ref.tensor_parallel"
        )
    bundles = assign_bundles(spec, locations)
    if bundles is None:
        raise PlacementError(
            f"tensor_parallel={widest} needs {widest} free GPUs on one node, and the cluster granted "
            f"{_per_node(locations)}. Fix: a smaller tensor_parallel, or nodes with more GPUs"
        )
    return tuple(Slot(bundle, *locations[bundle]) for bundle in bundles)


def refresh_slots(slots: Slots, *, timeout_seconds: float) -> Slots:
    """The same slots with the current locations of their bundles: Ray moves those of a dead node to another.

    Raises `PlacementError` if no node takes them before the deadline.
    """
    deadline = time.monotonic() + timeout_seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            locations = probe(slots.group, slots.gpus_per_slot, timeout_seconds=left)
        except RayError:
            continue  # the group is being rescheduled, or a node died during a probe
        moved = (replace(s, node=locations[s.bundle].node, gpu=locations[s.bundle].gpu) for s in slots.table)
        return replace(slots, table=tuple(replace(s, gpu_uuid=locations[s.bundle].uuid) for s in moved))
    raise PlacementError(
        f"a node of this run died, and no other node took its slots within "
        f"placement.start_timeout_seconds={timeout_seconds:g}: free now {ray.available_resources()}"
    )


def probe(group: PlacementGroup, gpus_per_slot: int, *, timeout_seconds: float) -> list[BundleLocation]:
    """Node and GPU of every bundle of the group. Raises `GetTimeoutError` at the deadline, and
    `PlacementError` for a GPU without a working driver.
    """
    probes = [
        _own_location.options(
            num_gpus=0.01 if gpus_per_slot else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        ).remote()
        for index in range(len(group.bundle_specs))
    ]
    try:
        return [BundleLocation(*location) for location in ray.get(probes, timeout=timeout_seconds)]
    except RayTaskError as error:
        if isinstance(error.cause, PlacementError):
            raise PlacementError(f"{error.cause}") from error
        raise


@ray.remote(num_cpus=0)
def _own_location() -> tuple[str, str | None, str | None]:
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return context.get_node_id(), gpus[0] if gpus else None, _uuid(gpus[0]) if gpus else None


def _uuid(gpu: str) -> str | None:
    """Process-independent identifier of a GPU; None without an NVIDIA driver."""
    return _nvidia_smi("uuid", f"--id={gpu}").strip() or None


def _nvidia_smi(query: str, *options: str) -> str:
    """Output of the query, without units; empty without an NVIDIA driver. Raises `PlacementError` if it does
    not answer.
    """
    command = ["nvidia-smi", *options, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True
        ).stdout
    except FileNotFoundError:
        return ""
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or getattr(error, "stdout", None) or f"{error}").strip()
        raise PlacementError(
            f"{' '.join(command)} failed on {socket.gethostname()}: {last_line(said)}. "
            "Fix: repair the node's NVIDIA driver, or leave the node out of the cluster"
        ) from error


def gpu_memory_bytes() -> int | None:
    """Memory of a GPU of this cluster; None without an NVIDIA driver, as on a fake cluster."""
    if not ray.cluster_resources().get("GPU", 0):
        return None
    return ray.get(_gpu_memory.remote(), timeout=PROBE_SECONDS)


@ray.remote(num_cpus=0, num_gpus=0.01)
def _gpu_memory() -> int | None:
    mib = [int(line) for line in _nvidia_smi("memory.total").split()]
    return min(mib) * 2**20 if mib else None


def _per_node(locations: list[BundleLocation]) -> str:
    counts: dict[str, int] = {}
    for location in locations:
        counts[location.node] = counts.get(location.node, 0) + 1
    return " + ".join(map(str, counts.values()))


def describe(slots: Slots) -> list[tuple[str, str, str]]:
    """Rows (role, units, slots) for the console."""
    return [
        (
            plan.role,
            str(len(plan.units)),
            ", ".join(
                "+".join(f"{index} ({slots.table[index].label})" for index in unit) for unit in plan.units
            ),
        )
        for plan in slots.spec.roles
    ]
