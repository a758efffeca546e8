"""Serve proxy replicas: they forward calls to a child actor on a slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray import serve

from rayrlhf.placement.memory_turns import loading_turn
from rayrlhf.placement.replica import SlotChild
from rayrlhf.placement.serve_status import failed_starts, health_check_period
from rayrlhf.placement.slots import Slots


@dataclass(frozen=True)
class ActorSpec:
    """Spec of the actor behind a Serve proxy replica; its method `ready` raises when unhealthy."""

    role: str
    actor_class: type
    arguments: tuple[Any, ...]
    env_vars: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float = 600
    start_timeout_seconds: float = 600


class ProxyReplica:
    """The Serve replica; `ask` calls a method of the actor."""

    async def __init__(self, spec: ActorSpec, slots: Slots) -> None:
        async with loading_turn(slots, spec.role, serve.get_replica_context().rank.rank):
            self.child = SlotChild(
                spec.role,
                spec.actor_class,
                *spec.arguments,
                slots=slots,
                env_vars=spec.env_vars,
                timeout_seconds=spec.timeout_seconds,
            )
            await self.child.call("ready", timeout_seconds=spec.start_timeout_seconds)

    async def ask(self, method: str, *arguments: Any) -> Any:
        return await self.child.call(method, *arguments)

    async def check_health(self) -> None:
        await self.child.call("ready")


def proxy_deployment(spec: ActorSpec, *, num_replicas: int, slots: Slots) -> Any:
    """The bound deployment for `serve.run`; each replica uses the slots of its rank in the role."""
    deployment = serve.deployment(ProxyReplica).options(
        name=spec.role,
        num_replicas=num_replicas,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=health_check_period(num_replicas),
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(num_replicas),
    )
    return deployment.bind(spec, slots)
