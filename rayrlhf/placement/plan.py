"""From the config to slots per role. Pure: neither Ray nor torch, so that a plan costs nothing.

A slot is one bundle of the run's placement group: one whole GPU with its CPUs, or CPUs alone. A role has
units (a training worker, an engine, a reward replica) and each unit owns the slot of its index; several roles
on one slot share its GPU by fixed shares.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.config.supervised import KdRunConfig, SupervisedConfig

# What a role takes of a GPU that it shares: enough that all of a slot's roles fit, most for the one that
# trains.
SHARED_GPU_SHARES = {"trainer": 0.5, "rollout": 0.3, "teacher": 0.3, "reward": 0.1, "ref": 0.1}
SMALLEST_SHARES = 10_000  # of a GPU; Ray counts in these
DATA_CPUS = 0.5  # Ray Data runs outside the group and stalls silently when the group has taken every CPU


@dataclass(frozen=True)
class RolePlan:
    role: str  # "trainer", "rollout", "ref", or "reward:<index of the source>"
    slots: tuple[int, ...]  # one per unit, in the order of the units' ranks
    gpu_share: float  # of a slot's GPU, where the slot has one


@dataclass(frozen=True)
class PlacementSpec:
    preset: str
    num_slots: int
    cpus_per_slot: float
    roles: tuple[RolePlan, ...]

    def of(self, role: str) -> RolePlan:
        return next(plan for plan in self.roles if plan.role == role)

    @property
    def total_cpus(self) -> float:
        return self.num_slots * self.cpus_per_slot


def plan_placement(config: PolicyRunConfig) -> PlacementSpec:
    """The slots of every role of a policy run that has some. Function rewards run on CPUs outside the
    group.
    """
    units = {"trainer": config.train.num_workers, "rollout": config.rollout.num_engines}
    if config.needs_ref and config.ref is not None and config.ref.location == "serve":
        units["ref"] = config.ref.num_replicas
    for index, source in enumerate(config.reward.sources):
        if source.type == "model":
            units[f"reward:{index}"] = source.num_replicas
    return place(units, config.placement)


def plan_supervised(config: SupervisedConfig) -> PlacementSpec:
    """The trainer's slots, and those of a teacher that is served."""
    units = {"trainer": config.train.num_workers}
    if isinstance(config, KdRunConfig) and config.teacher.location == "serve":
        units["teacher"] = config.teacher.num_replicas
    return place(units, config.placement)


def place(units: dict[str, int], placement: PlacementConfig) -> PlacementSpec:
    """Slots for so many units of every role: of their own, or the same ones for all."""
    shared = placement.preset == "colocate_all"
    roles: list[RolePlan] = []
    first = 0
    for role, count in units.items():
        share = _shared_gpu_share(role, list(units)) if shared else 1.0
        roles.append(RolePlan(role, tuple(range(first, first + count)), share))
        first += 0 if shared else count
    return PlacementSpec(
        preset=placement.preset,
        num_slots=max(units.values()) if shared else first,
        cpus_per_slot=placement.cpus_per_slot,
        roles=tuple(roles),
    )


def _shared_gpu_share(role: str, roles: list[str]) -> float:
    """Reward models divide theirs among them, rounded down to Ray's smallest amount, so that all fit."""
    kind = role.partition(":")[0]
    sharers = sum(other.partition(":")[0] == kind for other in roles)
    return SHARED_GPU_SHARES[kind] * SMALLEST_SHARES // sharers / SMALLEST_SHARES


def shortfall(
    spec: PlacementSpec, *, total: dict[str, float], free: dict[str, float], gpus_per_slot: int
) -> str | None:
    """Why the spec does not fit a cluster with these resources, in one sentence with the arithmetic; None
    if it does.
    """
    wanted = {"CPU": spec.total_cpus + DATA_CPUS, "GPU": float(spec.num_slots * gpus_per_slot)}
    working = {
        "CPU": f"{spec.num_slots} slots x {spec.cpus_per_slot:g} + {DATA_CPUS:g} for Ray Data",
        "GPU": f"{spec.num_slots} slots x {gpus_per_slot}",
    }
    for resource, need in wanted.items():
        for have, whose in ((total, "the cluster has"), (free, "the cluster has free")):
            if need > have.get(resource, 0.0) + 1e-6:
                return (
                    f"needs {need:g} {resource} ({working[resource]}) but {whose} {have.get(resource, 0.0):g}"
                )
    return None
