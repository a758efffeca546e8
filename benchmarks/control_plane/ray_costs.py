"""Unit costs of calls of the run's own actors, and of Ray Train's polls."""

from __future__ import annotations

import asyncio
import json
import os
import time
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import torch
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from rayrlhf.observe.board import Board, Posted, Report
from rayrlhf.policy.critic_channel import Answer, CriticChannel, Part, Request
from rayrlhf.weights.store import WeightStore

CALLS = 3000
WORKERS = 16
RANKS, PARTS = 64, 8


class Cpu:
    """Seconds of CPU of processes since the last look."""

    def __init__(self, *pids: int) -> None:
        self.processes = [psutil.Process(pid) for pid in pids]
        self.seconds = self._now()

    def spent(self) -> float:
        before, self.seconds = self.seconds, self._now()
        return self.seconds - before

    def _now(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(_pid))


def _pid(_: Any) -> int:
    return os.getpid()


def weight_store() -> dict[str, float]:
    """A renewal of an engine's lease."""
    store: Any = ray.remote(WeightStore).options(num_cpus=0).remote()
    ray.get(store.claim_turn.remote("engine 0 (started 1.0)", (0,), "loading"))
    cpu, own = Cpu(pid_of(store)), time.process_time()
    ray.get([store.renew_turn.remote("engine 0 (started 1.0)", (0,), "awake") for _ in range(CALLS)])
    found = {"store_call": cpu.spent() / CALLS, "caller": (time.process_time() - own) / CALLS}
    ray.kill(store)
    return found


def board() -> float:
    """A step's report: 60 metrics."""
    actor: Any = ray.remote(Board).options(num_cpus=0).remote()
    metrics = {f"group/metric_{i}": float(i) for i in range(60)}
    ray.get(actor.ping.remote())
    cpu = Cpu(pid_of(actor))
    ray.get(
        [actor.post.remote(Posted("poster", i, Report("step", i, metrics=metrics))) for i in range(CALLS)]
    )
    spent = cpu.spent() / CALLS
    ray.kill(actor)
    return spent


class Ranks:
    """Ranks of an actor or a critic in one process."""

    async def act(self, channel: Any, number: int, ranks: range, with_parts: bool) -> None:
        parts = [Part(ray.put(torch.zeros(64)), 1000 + i) for i in range(PARTS if with_parts else 0)]
        request = Request("values" if with_parts else "offload")
        await asyncio.gather(*(channel.ask.remote(1, RANKS, number, rank, request, parts) for rank in ranks))

    async def judge(self, channel: Any, ranks: range) -> None:
        async def one(rank: int) -> None:
            while (call := await channel.next.remote(1, rank)) is None:
                pass
            values = {number: ray.put(torch.zeros(64)) for number in call[1].parts}
            await channel.answer.remote(1, rank, Answer(values))

        await asyncio.gather(*map(one, ranks))


def mailbox() -> dict[str, float]:
    """CPU of the critic's channel per rank (of the actor and of the critic) and call: without micro-batches,
    and what each micro-batch adds.
    """
    channel: Any = ray.remote(CriticChannel).options(num_cpus=0, max_concurrency=1000).remote()
    ray.get(channel.join.remote(1, RANKS))
    actors: list[Any] = [ray.remote(Ranks).options(num_cpus=0).remote() for _ in range(2)]
    cpu, half = Cpu(pid_of(channel)), RANKS // 2
    found: list[float] = []
    number = 0
    for with_parts, times in ((False, 1), (False, 10), (True, 1), (True, 5)):
        cpu.spent()
        for _ in range(times):
            done = [a.act.remote(channel, number, range(RANKS), with_parts) for a in actors[:1]]
            done += [actors[1].judge.remote(channel, range(i * half, (i + 1) * half)) for i in range(2)]
            ray.get(done)
            number += 1
        found.append(cpu.spent() / times / RANKS)
    for actor in (channel, *actors):
        ray.kill(actor)
    _, plain, _, with_values = found
    return {"mailbox_rank": plain, "mailbox_part": (with_values - plain) / PARTS}


class Returns:
    """Returns a list of references, as the channel did to every rank of the critic."""

    def __init__(self, refs: list[Any]) -> None:
        self.parts = [Part(ref, 1000) for ref in refs]

    async def next(self, count: int) -> list[Part]:
        return self.parts[:count]


def reference() -> float:
    """CPU of an actor per reference in what it returns."""
    refs = [ray.put(i) for i in range(512)]
    actor: Any = ray.remote(Returns).options(num_cpus=0).remote(refs)
    cpu = Cpu(pid_of(actor))
    spent: list[float] = []
    for count in (0, 512):
        ray.get(actor.next.remote(count))
        cpu.spent()
        for _ in range(100):
            ray.get(actor.next.remote(count))
        spent.append(cpu.spent() / 100)
    ray.kill(actor)
    return (spent[1] - spent[0]) / 512


class FakeWorker:
    def poll_status(self) -> WorkerStatus:
        return WorkerStatus(running=True, error=None, training_report=None)


def train_polls() -> float:
    """CPU of Ray Train's controller per worker and poll: its own code, with workers that do nothing."""
    actors: list[Any] = [ray.remote(FakeWorker).options(num_cpus=0).remote() for _ in range(WORKERS)]
    group: Any = SimpleNamespace(_world_rank_to_ongoing_poll={}, _worker_health_check_timeout_s=600.0)
    group.get_workers = lambda: [SimpleNamespace(actor=actor) for actor in actors]
    group._get_poll_tasks = lambda: WorkerGroup._get_poll_tasks(group)
    WorkerGroup._poll_workers_and_collect_errors(group, 30.0)
    start = time.process_time()
    for _ in range(100):
        found = WorkerGroup._poll_workers_and_collect_errors(group, 30.0)
        assert all(status.running and status.error is None for status in found)
    spent = (time.process_time() - start) / (100 * WORKERS)
    for actor in actors:
        ray.kill(actor)
    return spent


def measure() -> dict[str, float]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=500_000_000)
    found = weight_store() | mailbox()
    found |= {"board_report": board(), "reference": reference(), "train_poll": train_polls()}
    ray.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
