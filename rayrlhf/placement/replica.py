"""Child actor of a Serve replica, on the slot of the replica's rank.

Serve cannot place a replica on a bundle of an existing placement group, so replicas stay light (no CPU, no
GPU) and a child actor on the planned slot does the work. The replica owns the actor, which dies with it.
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

from rayrlhf.placement.reaper import register_worker
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
        # A tensor-parallel engine has a separate worker on each of its slots.
        num_gpus = unit[0].gpu_share if len(unit) == 1 else 0
        self.actor: Any = (
            ray.remote(_registered(actor_class))
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
            if timeout_seconds is not None:  # still starting: propagate the constructor's error to Serve
                raise
            self._exit()

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """Items of a generator method, each within the deadline. Leaving the iteration cancels the method."""
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
            self._exit()
        finally:
            if not finished:
                ray.cancel(refs)

    def _exit(self) -> NoReturn:
        """Exit immediately: a replica without its actor must not take traffic until the next health check.

        Serve starts a new replica and callers retry on another one.
        """
        print(f"{self.role} replica {self.rank}: its actor died, restarting the replica", flush=True)
        os._exit(1)


def tensor_parallel_env(unit: Sequence[Slot]) -> dict[str, str]:
    """Environment that makes vLLM's ray executor place an engine's workers on the bundles of its slots."""
    if len(unit) == 1:
        return {}
    return {
        "VLLM_RAY_BUNDLE_INDICES": ",".join(str(slot.bundle) for slot in unit),
        "VLLM_RAY_PER_WORKER_GPUS": f"{unit[0].gpu_share:g}",
    }


def _registered(actor_class: type) -> type:
    """Subclass that registers its node, GPU and pid with the run before `__init__`."""

    class Registered(actor_class):
        def __init__(self, unit: tuple[str, str, int], *arguments: Any) -> None:
            register_worker(*unit)
            super().__init__(*arguments)

    Registered.__name__ = Registered.__qualname__ = actor_class.__name__  # shown in Ray's list of actors
    return Registered


async def _awaitable(ref: ObjectRef) -> Any:
    return await ref
