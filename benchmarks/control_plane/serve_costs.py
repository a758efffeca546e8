"""Unit costs of Ray Serve with fake replicas that have no model: health checks, control loop, calls."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from benchmarks.control_plane.ray_costs import Cpu, pid_of
from rayrlhf.reward.items import ScoreItem
from rayrlhf.samples import Prompt
from rayrlhf.weights.store import TensorSlice
from rayrlhf.weights.transfer_group import DirectPush, Receiver, TransferGroup
from rayrlhf.weights.transfer_store import Address

REPLICAS = 40
WINDOW_SECONDS = 20.0
NEVER = 10_000.0
CALLS = 200


class FakeEngine:
    async def describe(self) -> dict[str, Any]:
        return {
            "replica": serve.get_replica_context().rank.rank,
            "pid": os.getpid(),
            "devices": ["GPU-" + "0" * 36],
        }

    async def receive(self, push: DirectPush) -> dict[str, int]:
        return {"replica": push.number}

    async def score(self, items: list[ScoreItem]) -> list[float]:
        return [1.0] * len(items)

    async def generate(self, prompt_ids: list[int], sampling: list[dict[str, Any]]) -> Any:
        for index, _ in enumerate(sampling):
            yield index, len(prompt_ids)

    async def check_health(self) -> None:
        pass


def deploy(num_replicas: int, period: float) -> Any:
    deployment = serve.deployment(FakeEngine).options(
        name="engines",
        num_replicas=num_replicas,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=period,
        health_check_timeout_s=600,
        graceful_shutdown_timeout_s=0,
    )
    return serve.run(deployment.bind(), name="scale", route_prefix=None)


def push_at_scale(engines: int) -> DirectPush:
    """What a push of an 8B model tells each of the engines: the layout of its 291 tensors in 120 buckets."""
    address = Address("tcp://10.0.0.1:41234", b"k" * 40, b"m" * 40, b"s" * 40)
    receivers = {i: Receiver(4000 + i, (f"GPU-{i:036d}",), f"{i // 8:056d}") for i in range(engines)}
    stores = {receiver.devices[0]: address for receiver in receivers.values()}
    group = TransferGroup("ipc", address, receivers, 600.0, stores)
    buckets = tuple(
        tuple(
            TensorSlice(
                f"model.layers.{b}.self_attn.q_proj{i}.weight", "bfloat16", (4096, 4096), i << 25, 1 << 25
            )
            for i in range(3)
        )
        for b in range(120)
    )
    return DirectPush(group, 7, 7, buckets)


def controller_share(cpu: Cpu) -> float:
    """Seconds of CPU per second."""
    cpu.spent()
    start = time.perf_counter()
    time.sleep(WINDOW_SECONDS)
    return cpu.spent() / (time.perf_counter() - start)


async def calls(handle: Any, at_once: int) -> None:
    items = [ScoreItem(Prompt(0, [1] * 256, "p" * 1000), "r" * 4000, [1] * 2304)] * at_once

    async def score() -> None:
        await handle.score.remote(items)

    for _ in range(CALLS // 10):
        await asyncio.gather(*(score() for _ in range(10)))


async def streams(handle: Any) -> None:
    async def one() -> None:
        async for _ in handle.options(stream=True).generate.remote(
            [1] * 256, [{"temperature": 1.0, "seed": 1}] * 8
        ):
            pass

    for _ in range(CALLS // 10):
        await asyncio.gather(*(one() for _ in range(10)))


def per_call(call: Any, replicas: Cpu) -> tuple[float, float]:
    """CPU of the caller, and of all replicas, per call."""
    asyncio.run(call())
    replicas.spent()
    start = time.process_time()
    asyncio.run(call())
    return (time.process_time() - start) / CALLS, replicas.spent() / CALLS


def broadcast(handle: Any, *arguments: Any) -> tuple[float, float]:
    """Wall-clock seconds, and CPU of the caller, per replica."""
    handle.broadcast(*arguments).results(timeout_s=120)
    wall, own = time.perf_counter(), time.process_time()
    for _ in range(10):
        assert len(handle.broadcast(*arguments).results(timeout_s=120)) == REPLICAS
    return (time.perf_counter() - wall) / 10 / REPLICAS, (time.process_time() - own) / 10 / REPLICAS


def actor_call() -> float:
    """CPU of the caller per call of an actor, in a round of calls of 16 actors, without Serve."""
    actors: list[Any] = [ray.remote(Cpu).options(num_cpus=0).remote() for _ in range(16)]
    ray.get([actor.spent.remote() for actor in actors])
    start = time.process_time()
    for _ in range(20):
        ray.get([actor.spent.remote() for actor in actors])
    seconds = (time.process_time() - start) / 20 / len(actors)
    for actor in actors:
        ray.kill(actor)
    return seconds


def measure() -> dict[str, float]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=500_000_000)
    serve.start(proxy_location="Disabled")
    deploy(1, NEVER)
    client: Any = _get_global_client()
    cpu = Cpu(pid_of(client._controller))
    time.sleep(5)
    one = controller_share(cpu)
    handle = deploy(REPLICAS, NEVER)
    time.sleep(5)
    idle = controller_share(cpu)
    found: dict[str, float] = {"controller_idle": one, "controller_replica": (idle - one) / (REPLICAS - 1)}
    pids = [answer["pid"] for answer in handle.broadcast("describe").results(timeout_s=120)]
    replicas = Cpu(*pids)
    found["actor_call"] = actor_call()
    _, found["broadcast_replica"] = broadcast(handle, "describe")
    _, found["broadcast_push_replica"] = broadcast(handle, "receive", push_at_scale(512))
    _, found["broadcast_reference_replica"] = broadcast(handle, "receive", ray.put(push_at_scale(512)))
    found["request_of_one_caller"], found["request_of_one_replica"] = per_call(
        lambda: calls(handle, 1), replicas
    )
    found["request_of_eight_caller"], found["request_of_eight_replica"] = per_call(
        lambda: calls(handle, 8), replicas
    )
    found["stream_caller"], found["stream_replica"] = per_call(lambda: streams(handle), replicas)
    deploy(REPLICAS, 1.0)
    time.sleep(5)
    found["health_check"] = (controller_share(cpu) - idle) / REPLICAS
    serve.shutdown()
    ray.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
