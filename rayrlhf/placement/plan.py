"""Plan the slots of each role from the config. Pure: imports neither Ray nor torch, so that planning is fast.

A slot is one bundle of the run's placement group: one whole GPU with its CPUs, or only CPUs. Slots belong to
pools. A role has units (a training worker, an engine, a reward replica), each on one slot of its pool, or on
several neighbouring ones (a tensor-parallel engine); the roles of a pool share its GPUs in fixed fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.config.placement import PlacementConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.supervised import KdRunConfig, SupervisedConfig

# Relative GPU share of a role among those that share a GPU. Only for Ray's resource accounting: the memory of
# an engine is set by rollout.gpu_memory_utilization.
SHARE_WEIGHTS = {"actor": 5, "critic": 3, "rollout": 3, "teacher": 3, "reward": 1, "ref": 1, "score": 0}
SHARES_PER_GPU = 10_000  # Ray's resolution of fractional GPUs
DATA_CPUS = (
    0.5  # for Ray Data, which runs outside the group and stalls silently if the group reserves every CPU
)


@dataclass(frozen=True)
class Units:
    count: int
    width: int = 1  # slots per unit


@dataclass(frozen=True)
class RolePlan:
    role: str  # "actor", "critic", "rollout", "ref", "teacher" or "reward:<index of the source>"
    units: tuple[tuple[int, ...], ...]  # slots of each unit, in rank order
    gpu_share: float  # of the GPU of each slot, if it has one

    @property
    def slots(self) -> tuple[int, ...]:
        """The first slot of every unit."""
        return tuple(unit[0] for unit in self.units)

    @property
    def width(self) -> int:
        return len(self.units[0])


@dataclass(frozen=True)
class PoolPlan:
    name: str
    slots: tuple[int, ...]
    roles: tuple[RolePlan, ...]

    @property
    def width(self) -> int:
        """Number of slots that must be on one node: the width of the widest unit."""
        return max(plan.width for plan in self.roles)


@dataclass(frozen=True)
class PlacementSpec:
    preset: str
    cpus_per_slot: float
    pools: tuple[PoolPlan, ...]

    @property
    def roles(self) -> tuple[RolePlan, ...]:
        return tuple(plan for pool in self.pools for plan in pool.roles)

    def of(self, role: str) -> RolePlan:
        return next(plan for plan in self.roles if plan.role == role)

    @property
    def num_slots(self) -> int:
        return sum(len(pool.slots) for pool in self.pools)

    @property
    def total_cpus(self) -> float:
        return self.num_slots * self.cpus_per_slot


def plan_job(config: Any) -> PlacementSpec:
    """The placement of any job that uses slots: policy, supervised or generate. Raises `ConfigError`."""
    if isinstance(config, PolicyRunConfig):
        return plan_placement(config)
    if isinstance(config, SupervisedConfig):
        return plan_supervised(config)
    if isinstance(config, GenerateRunConfig):
        return plan_generate(config)
    raise TypeError(f"no placement for {type(config).__name__}")


def plan_placement(config: PolicyRunConfig) -> PlacementSpec:
    """The placement of a policy run. A critic or reference in the actor's workers has no separate slots, and
    function rewards run on CPUs outside the group.
    """
    rollout = config.rollout
    units = {"actor": Units(config.train.num_workers)}
    if config.critic_is_separate:
        units["critic"] = Units(config.num_critic_workers)
    units["rollout"] = Units(rollout.num_engines, rollout.tensor_parallel)
    if config.ref_is_served:
        assert config.ref is not None
        units["ref"] = Units(config.ref.num_replicas, config.ref.tensor_parallel)
    return place(units | _reward_units(config.reward), config.placement)


def plan_supervised(config: SupervisedConfig) -> PlacementSpec:
    """Slots of the training workers and of a served teacher."""
    units = {"actor": Units(config.train.num_workers)}
    if isinstance(config, KdRunConfig) and config.teacher.location == "serve":
        units["teacher"] = Units(config.teacher.num_replicas)
    return place(units, config.placement)


def plan_generate(config: GenerateRunConfig) -> PlacementSpec:
    """Slots of the engines and the reward models; one slot without a GPU if there are neither."""
    units: dict[str, Units] = {}
    if config.data.response_key is None:
        units["rollout"] = Units(config.rollout.num_engines, config.rollout.tensor_parallel)
    units |= _reward_units(config.reward)
    return place(units or {"score": Units(1)}, config.placement)


def _reward_units(reward: RewardConfig | None) -> dict[str, Units]:
    sources = enumerate(reward.sources if reward is not None else [])
    return {f"reward:{i}": Units(source.num_replicas) for i, source in sources if source.type == "model"}


def place(units: Mapping[str, Units], placement: PlacementConfig) -> PlacementSpec:
    """Allocate pools of slots for the units of every role. Raises `ConfigError` if a pool is too small."""
    pools: list[PoolPlan] = []
    first = 0
    for name, roles in _pools_of(list(units), placement):
        wanted = max(units[role].count * units[role].width for role in roles)
        size = _given_slots(name, placement) or wanted
        if size < wanted:
            raise ConfigError([_too_small(name, size, {role: units[role] for role in roles})])
        plans = tuple(_plan(role, units[role], first, _gpu_share(role, roles)) for role in roles)
        pools.append(PoolPlan(name, tuple(range(first, first + size)), plans))
        first += size
    return PlacementSpec(placement.preset, placement.cpus_per_slot, tuple(pools))


def _pools_of(roles: list[str], placement: PlacementConfig) -> list[tuple[str, list[str]]]:
    """(name, roles) of every pool, in the order of their first roles."""
    # (name, is shared) -> roles: a shared pool may have the name of a role that is not in it.
    pools: dict[tuple[str, bool], list[str]] = {}
    for role in roles:
        shared = next((name for name, members in placement.shared if kind_of(role) in members), None)
        pools.setdefault((shared or role, shared is not None), []).append(role)
    return [(name, members) for (name, _), members in pools.items()]


def kind_of(role: str) -> str:
    """The role without the source index: `reward` for `reward:1`."""
    return role.partition(":")[0]


def _plan(role: str, units: Units, first: int, gpu_share: float) -> RolePlan:
    starts = range(first, first + units.count * units.width, units.width)
    return RolePlan(role, tuple(tuple(range(start, start + units.width)) for start in starts), gpu_share)


def _gpu_share(role: str, roles: list[str]) -> float:
    """A role's GPU share in its pool, rounded down to Ray's resolution so that all roles fit.

    Reward models split one share.
    """
    sharers = sum(kind_of(other) == kind_of(role) for other in roles)
    total = sum(SHARE_WEIGHTS[kind] for kind in {kind_of(other) for other in roles})
    parts = SHARE_WEIGHTS[kind_of(role)] * SHARES_PER_GPU // (max(total, 1) * sharers)
    return parts / SHARES_PER_GPU


def _given_slots(name: str, placement: PlacementConfig) -> int | None:
    return next((pool.slots for pool in placement.pools if pool.name == name), None)


def _too_small(name: str, size: int, units: Mapping[str, Units]) -> Problem:
    needs = ", ".join(f"{role} {_arithmetic(need)}" for role, need in units.items())
    largest = max(need.count * need.width for need in units.values())
    return Problem(
        "placement.pools",
        got=f"pool {name} with {slots_in_words(size)}",
        wanted=f"at least {largest}: {needs}",
        fix=f"raise the slots of pool {name} to {largest}, remove them, or configure fewer units",
    )


def _arithmetic(units: Units) -> str:
    return (
        f"{units.count} x {slots_in_words(units.width)}" if units.width > 1 else slots_in_words(units.count)
    )


def slots_in_words(count: int) -> str:
    """For example "1 slot"."""
    return f"{count} slot{'s' * (count != 1)}"


def shortfall(
    spec: PlacementSpec, *, total: dict[str, float], free: dict[str, float], gpus_per_slot: int
) -> str | None:
    """Why the spec does not fit a cluster with these resources, as a sentence with the arithmetic; None if it
    fits.
    """
    wanted = {"CPU": spec.total_cpus + DATA_CPUS, "GPU": float(spec.num_slots * gpus_per_slot)}
    working = {
        "CPU": f"{slots_in_words(spec.num_slots)} x {spec.cpus_per_slot:g} + {DATA_CPUS:g} for Ray Data",
        "GPU": f"{slots_in_words(spec.num_slots)} x {gpus_per_slot}",
    }
    for resource, need in wanted.items():
        for have, whose in ((total, "the cluster has"), (free, "the cluster has free")):
            if need > have.get(resource, 0.0) + 1e-6:
                return (
                    f"needs {need:g} {resource} ({working[resource]}) but {whose} {have.get(resource, 0.0):g}"
                )
    return None
