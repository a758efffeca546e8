"""A Serve replica's heavy half: an actor on the slot of the replica's rank.

Serve cannot place a replica on a bundle of somebody else's placement group, so replicas stay light (no CPU,
no GPU) and the actor that does the work goes where the plan says. It belongs to its replica and dies with it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import ray
from ray import ObjectRef, serve
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.placement.reaper import sit_down
from rayrlhf.placement.slots import Slot, Slots


class SlotChild:
    """The actor on the slot of this replica's rank, and calls to it with a deadline."""

    def __init__(
        self,
        role: str,
        actor_class: type,
        *arguments: Any,
        slots: Slots,
        env_vars: dict[str, str],
        timeout_seconds: float,
    ) -> None:
        self.role = role
        self.rank = serve.get_replica_context().rank.rank
        self.timeout_seconds = timeout_seconds
        unit = slots.unit(role, self.rank)
        # An engine that spans several slots has a worker of its own on each.
        num_gpus = unit[0].gpu_share if len(unit) == 1 else 0
        self.actor: Any = (
            ray.remote(_seated(actor_class))
            .options(
                num_cpus=0,
                num_gpus=num_gpus,
                max_concurrency=1000,
                scheduling_strategy=PlacementGroupSchedulingStrategy(slots.group, unit[0].bundle),
                runtime_env={"env_vars": env_vars | tensor_parallel_env(unit)},
            )
            .remote((slots.run_id, role, self.rank), *arguments)
        )

    async def call(self, method: str, *arguments: Any, timeout_seconds: float | None = None) -> Any:
        """The method's result. Raises `TimeoutError` at the deadline and whatever the method raises."""
        ref = getattr(self.actor, method).remote(*arguments)
        try:
            return await asyncio.wait_for(_awaitable(ref), timeout_seconds or self.timeout_seconds)
        except RayActorError:
            if timeout_seconds is not None:  # still starting: let the constructor's error reach Serve
                raise
            self._leave()

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """What a generator method yields, each item within the deadline. Leaving early cancels the method."""
        refs = getattr(self.actor, method).options(num_returns="streaming").remote(*arguments)
        finished = False
        try:
            while True:
                try:
                    ref = await asyncio.wait_for(anext(refs), self.timeout_seconds)
                except StopAsyncIteration:
                    finished = True
                    return
                yield await ref
        except RayActorError:
            finished = True
            self._leave()
        finally:
            if not finished:
                ray.cancel(refs)

    def _leave(self) -> NoReturn:
        """A replica without its actor must not take traffic until a health check finds out: leave at once.

        Serve starts a new one and callers retry elsewhere.
        """
        print(f"{self.role} replica {self.rank}: its actor died, restarting the replica", flush=True)
        os._exit(1)


def tensor_parallel_env(unit: Sequence[Slot]) -> dict[str, str]:
    """Where vLLM's ray executor puts the workers of an engine: the bundles of its slots, in this group."""
    if len(unit) == 1:
        return {}
    return {
        "VLLM_RAY_BUNDLE_INDICES": ",".join(str(slot.bundle) for slot in unit),
        "VLLM_RAY_PER_WORKER_GPUS": f"{unit[0].gpu_share:g}",
    }


def _seated(actor_class: type) -> type:
    """The class, but an instance tells first where it is."""

    class Seated(actor_class):
        def __init__(self, seat: tuple[str, str, int], *arguments: Any) -> None:
            sit_down(*seat)
            super().__init__(*arguments)

    Seated.__name__ = Seated.__qualname__ = actor_class.__name__  # what Ray's lists of actors show
    return Seated


async def _awaitable(ref: ObjectRef) -> Any:
    return await ref
