"""Whose turn it is on GPUs that engines share with trainers and other models.

An engine sizes its cache by the memory that is free while it starts, and takes nearly all of it. So trainers
load and train only while every engine sleeps, and nothing else loads on an engine's GPUs while it starts.
`MemoryTurns` decides and is part of the weight store; `Lease` is the side of a process that asks. A lease
ends with its process: it is renewed in the background, and expires.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.placement.slots import Slots

RENEW_SECONDS = 3.0
RENEWALS_PER_SECOND = 40  # of all leases together, by the one store; 512 engines renew theirs every 13 s
LEASE_SECONDS = 15.0  # that a lease lasts without a renewal, or five times their interval if that is longer
POLL_SECONDS = 0.5

# "starting", "awake" and "asleep" are stages of engines, "loading" is that of other models.
Stage = Literal["starting", "awake", "asleep", "loading"]


def renewal_seconds(num_engines: int) -> float:
    return max(RENEW_SECONDS, num_engines / RENEWALS_PER_SECOND)


def lease_seconds(num_engines: int) -> float:
    return max(LEASE_SECONDS, 5 * renewal_seconds(num_engines))


class TurnsNotKnown(RuntimeError):
    """The process that knew the leases died, and not all of them have been renewed yet: try again."""


@dataclass(frozen=True)
class Holder:
    """Who uses the memory of these slots, e.g. of two by an engine: Holder((0, 1), "starting", 12.0)."""

    slots: tuple[int, ...]
    stage: Stage
    expires: float  # by the clock of `MemoryTurns`


class MemoryTurns:
    """The leases of a run, by name."""

    def __init__(
        self,
        num_engines: int = 1,
        *,
        is_restarted: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            num_engines: of the run, which determine how long a lease lasts.
            is_restarted: there may be leases that are not known until they are renewed.
        """
        self.clock = clock
        self.seconds = lease_seconds(num_engines)
        self.complete_from = clock() + self.seconds if is_restarted else clock()
        self._holders: dict[str, Holder] = {}

    def claim(self, name: str, slots: Sequence[int], stage: Stage) -> bool:
        """Start an engine ("starting"), or load another model ("loading"), on these slots.

        Returns:
            False if that must wait: an engine for all that load there, another model for engines that start.

        Raises:
            TurnsNotKnown
        """
        stops: tuple[Stage, ...] = ("starting", "loading") if stage == "starting" else ("starting",)
        if any(
            holder.stage in stops and not set(slots).isdisjoint(holder.slots)
            for other, holder in self.holders().items()
            if other != name
        ):
            return False
        self._holders[name] = Holder(tuple(slots), stage, self.clock() + self.seconds)
        return True

    def renew(self, name: str, slots: Sequence[int], stage: Stage) -> None:
        """Prolong a lease; one that is not known is taken to be in `stage`."""
        known = self._holders.get(name, Holder(tuple(slots), stage, 0.0))
        self._holders[name] = replace(known, expires=self.clock() + self.seconds)

    def move_to(self, name: str, stage: Stage) -> None:
        """The holder has reached this stage. A lease that is not known will be renewed."""
        if name in self._holders:
            self._holders[name] = replace(self._holders[name], stage=stage)

    def end(self, name: str) -> None:
        self._holders.pop(name, None)

    def engines_up(self) -> dict[str, Stage]:
        """Engines that hold memory, by name: those that start and those that are awake. Raises
        `TurnsNotKnown`.
        """
        return {
            name: holder.stage
            for name, holder in self.holders().items()
            if holder.stage in ("starting", "awake")
        }

    def holders(self) -> dict[str, Holder]:
        now = self.clock()
        if now < self.complete_from:
            raise TurnsNotKnown("leases of GPU memory are being renewed")
        self._holders = {name: each for name, each in self._holders.items() if each.expires > now}
        return self._holders


class Lease:
    """One process's lease, on the slots of one unit of a role."""

    def __init__(self, store: Any, name: str, slots: Sequence[int], num_engines: int = 1) -> None:
        """`store`: the actor with the methods of `MemoryTurns` (`weights.store.WeightStore`)."""
        self.store = store
        self.renewal_seconds = renewal_seconds(num_engines)
        self.name = name
        self.slots = tuple(slots)
        self.renewal: asyncio.Task[None] | None = None

    async def claim(self, stage: Stage) -> None:
        """Wait for the turn; afterwards the lease is renewed until `end`. No deadline here: that of the
        trainers ends their turn, or the run.
        """
        while not await self._granted(stage):
            await asyncio.sleep(POLL_SECONDS)
        self.renewal = asyncio.create_task(self._renew("awake" if stage == "starting" else stage))

    async def end(self) -> None:
        if self.renewal is not None:
            self.renewal.cancel()
        with suppress(RayActorError):  # restarting or dead: the lease expires
            await self.store.end_turn.remote(self.name)

    async def _granted(self, stage: Stage) -> bool:
        try:
            return await self.store.claim_turn.remote(self.name, self.slots, stage)
        except (TurnsNotKnown, ActorUnavailableError):
            return False

    async def _renew(self, stage: Stage) -> None:
        """`stage`: of a lease that a restarted store does not know; the one in which it holds most memory."""
        while True:
            await asyncio.sleep(self.renewal_seconds)
            try:
                await self.store.renew_turn.remote(self.name, self.slots, stage)
            except ActorUnavailableError:
                continue  # restarting
            except RayActorError:
                return  # dead for good, with its run


def lease_of(slots: Slots, role: str, rank: int) -> Lease | None:
    """The lease of a unit of a role; None if no engine of the run ever sleeps."""
    if slots.memory_turns is None:
        return None
    store = ray.get_actor(slots.memory_turns, namespace=NAMESPACE)
    # A replica that is started again is another holder: its predecessor's memory is freed by its death.
    name = f"{role} {rank} (started {time.time():.3f})"
    num_engines = len(slots.spec.of("rollout").units)
    return Lease(store, name, [slot.bundle for slot in slots.unit(role, rank)], num_engines)


@asynccontextmanager
async def loading_turn(slots: Slots, role: str, rank: int) -> AsyncIterator[None]:
    """Load a model on the slots of a unit inside: not while an engine starts there."""
    lease = lease_of(slots, role, rank)
    if lease is None:
        yield
        return
    await lease.claim("loading")
    try:
        yield
    finally:
        await lease.end()
