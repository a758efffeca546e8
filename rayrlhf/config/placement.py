"""`placement`: which roles share slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Count, NotBool, PositiveNumber, Problem, Section, Wanted

Role = Literal["actor", "critic", "ref", "reward", "rollout", "teacher"]
Preset = Literal[
    "auto",
    "disaggregated",
    "colocate_actor_ref",
    "colocate_critic_reward",
    "colocate_actor_ref+critic_reward",
    "colocate_all",
    "pools",
]

ACTOR_REF: tuple[str, tuple[Role, ...]] = ("actor+ref", ("actor", "ref"))
CRITIC_REWARD: tuple[str, tuple[Role, ...]] = ("critic+reward", ("critic", "reward"))
EVERYTHING: tuple[str, tuple[Role, ...]] = (
    "all",
    ("actor", "critic", "ref", "reward", "rollout", "teacher"),
)
# Names of pools and the roles that share their slots; every other role has its own slots.
PRESETS: dict[str, tuple[tuple[str, tuple[Role, ...]], ...]] = {
    "auto": (),  # resolved by the driver, which knows the cluster
    "disaggregated": (),
    "colocate_actor_ref": (ACTOR_REF,),
    "colocate_critic_reward": (CRITIC_REWARD,),
    "colocate_actor_ref+critic_reward": (ACTOR_REF, CRITIC_REWARD),
    "colocate_all": (EVERYTHING,),
}


class PoolConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$"), Wanted("letters, digits, '_' and '-'")]
    """Name in tables and messages."""
    roles: list[Role] = Field(min_length=1)
    """Roles that share the slots of this pool; an actor is what trains in any job."""
    slots: Count | None = None
    """Slots of this pool; what its largest role needs when left out."""


def _pools_are_for_pools(placement: PlacementConfig) -> Problem | None:
    if (placement.preset == "pools") == bool(placement.pools):
        return None
    if placement.pools:
        return Problem(
            "pools",
            got=f"{len(placement.pools)} pools with preset={placement.preset}",
            wanted="no pools: the preset says which roles share slots",
            fix="set placement.preset to pools, or remove placement.pools",
        )
    return Problem(
        "pools",
        got="nothing with preset=pools",
        wanted="at least one pool with its roles",
        fix="give placement.pools, for example [{name: train, roles: [actor, ref]}], or take another preset",
    )


def _pools_are_disjoint(placement: PlacementConfig) -> Problem | None:
    for key, found in (
        ("name", Counter(pool.name for pool in placement.pools)),
        ("roles", Counter(role for pool in placement.pools for role in pool.roles)),
    ):
        twice = [value for value, count in found.items() if count > 1]
        if twice:
            return Problem(
                "pools",
                got=f"{key} {twice[0]} more than once",
                wanted="every name and every role once: a role has one pool",
                fix="remove the second one",
            )
    return None


class PlacementConfig(Section):
    preset: Preset = "auto"
    """Roles that share slots: none (disaggregated), those named, all, of pools; auto: none if it fits."""
    pools: list[PoolConfig] = Field(default_factory=list)
    """With preset: pools, the groups of roles that share slots; a role in none of them gets its own."""
    cpus_per_slot: PositiveNumber = 1.0
    """CPUs reserved per slot."""
    gpus_per_slot: Annotated[Literal[0, 1, "auto"], NotBool] = "auto"
    """GPUs per slot; auto is 1 on a cluster with GPUs."""
    start_timeout_seconds: PositiveNumber = 300
    """Deadline for the cluster to grant the slots."""

    checks = (_pools_are_for_pools, _pools_are_disjoint)

    @property
    def shared(self) -> Sequence[tuple[str, Sequence[str]]]:
        """(name, roles) of every group of roles that share their slots."""
        if self.preset == "pools":
            return [(pool.name, pool.roles) for pool in self.pools]
        return PRESETS[self.preset]

    def together(self, one: Role, other: Role) -> bool:
        """Whether two roles share their slots."""
        return any(one in roles and other in roles for _, roles in self.shared)
