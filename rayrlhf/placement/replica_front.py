"""Serve replicas that only pass calls on to their actor on its slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray import serve

from rayrlhf.placement.replica import SlotChild
from rayrlhf.placement.slots import Slots


@dataclass(frozen=True)
class Behind:
    """What works behind a front: `actor_class(*arguments)`. Its method `ready` raises when it is not well."""

    role: str
    actor_class: type
    arguments: tuple[Any, ...]
    env_vars: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float = 600
    start_timeout_seconds: float = 600


class Front:
    """The replica; `ask` calls the actor's methods."""

    async def __init__(self, behind: Behind, slots: Slots) -> None:
        self.child = SlotChild(
            behind.role,
            behind.actor_class,
            *behind.arguments,
            slots=slots,
            env_vars=behind.env_vars,
            timeout_seconds=behind.timeout_seconds,
        )
        await self.child.call("ready", timeout_seconds=behind.start_timeout_seconds)

    async def ask(self, method: str, *arguments: Any) -> Any:
        return await self.child.call(method, *arguments)

    async def check_health(self) -> None:
        await self.child.call("ready")


def front_deployment(behind: Behind, *, num_replicas: int, slots: Slots) -> Any:
    """The bound deployment for `serve.run`; each replica owns the slots of its rank in the role."""
    deployment = serve.deployment(Front).options(
        name=behind.role,
        num_replicas=num_replicas,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(behind, slots)
