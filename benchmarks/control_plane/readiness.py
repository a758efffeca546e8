"""What a CPU can measure of how rayrlhf uses GPUs, before and after; the real code in each case."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch

from benchmarks import engine_outputs
from jobs.demo.model import REPOSITORY, ensure_model
from rayrlhf.capacity.micro_batch import GPU_CHUNK
from rayrlhf.config.parse import load_config
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.load import load_tokenizer
from rayrlhf.placement.process_variables import threads_of
from rayrlhf.placement.slots import Slots
from rayrlhf.rollout import sticky_router
from rayrlhf.rollout.engine import EngineSettings, rollout_deployment
from rayrlhf.rollout.sticky_router import StickyRouter
from rayrlhf.rollout.vllm_outputs import flat
from rayrlhf.train import offload, process_group
from rayrlhf.weights import sync
from rayrlhf.weights.buckets import GatheredTensor
from rayrlhf.weights.sync import WeightSync

MODEL_BYTES = 64 << 20
SESSIONS, TURNS, ENGINES = 512, 5, 8


class Store:
    """In place of the client of the weight store."""

    def announce(self, version: int) -> int:
        return version

    def publish(self, publication: Any) -> None:
        pass


class ReachesAll:
    """In place of `DirectSender`: a push that reaches every engine."""

    def start(self, *_: Any, **__: Any) -> bool:
        return True

    def send(self, *_: Any) -> None:
        return None

    def finish(self) -> None:
        return None


def published_bytes() -> dict[str, int]:
    """Into the object store, per direct push of 64 MiB: always, as before and as with partitioned weights,
    and on demand.
    """
    tensors = [GatheredTensor(f"weight {i}", torch.ones(1 << 20)) for i in range(MODEL_BYTES >> 22)]
    found: dict[str, int] = {}
    put = ray.put
    for name, partitioned in (("before", True), ("after", False)):
        moved: list[int] = []
        sync.ray.put = lambda array, moved=moved: moved.append(array.nbytes)
        try:
            weights = WeightSync.__new__(WeightSync)
            weights.__dict__ |= {
                "rank": 0,
                "partitioned": partitioned,
                "bucket_bytes": 16 << 20,
                "base": None,
            }
            weights.__dict__ |= {"weight_store": Store(), "direct": ReachesAll(), "publishing": None}
            weights.__dict__ |= {"pending_copies": [], "pushed": None, "timeout_seconds": 60.0}
            weights.__dict__ |= {"gathered": lambda _: nullcontext()}
            weights.pushed_lock = sync.threading.Lock()
            weights.copier = sync.ThreadPoolExecutor(1)
            assert weights._push(tensors, 1) is None
            weights._wait_until_published()
        finally:
            sync.ray.put = put
        found[name] = sum(moved)
    return found


def offloaded_bytes() -> dict[str, int]:
    """Host memory that is newly allocated in the second offload of 64 MiB of states."""
    states = [torch.ones(1 << 20) for _ in range(MODEL_BYTES >> 22)]
    buffers: list[torch.Tensor] = []
    offload.to_host(states, buffers, pinned=False)
    before = {buffer.data_ptr() for buffer in buffers}
    offload.to_device(states, torch.device("cpu"))
    offload.to_host(states, buffers, pinned=False)
    new = sum(buffer.nbytes for buffer in buffers if buffer.data_ptr() not in before)
    return {"before": MODEL_BYTES, "after": new}


def output_microseconds() -> dict[str, float]:
    """Per token, of the containers of log-probabilities in an engine's thread; the median of five rounds."""
    tokenizer = load_tokenizer(f"{ensure_model()}")
    generator = np.random.default_rng(0)
    steps = [
        [
            engine_outputs.LogprobsLists(ids[None], np.array([[-1.0]], np.float32), np.array([3]))
            for ids in row
        ]
        for row in generator.integers(100, 40_000, (engine_outputs.TOKENS, engine_outputs.SEQUENCES, 1))
    ]
    defaults = SimpleNamespace(num_logprobs=0, prompt_logprobs=None, flat_logprobs=False)
    ways: dict[str, tuple[Any, Any]] = {
        "before": (tokenizer, defaults),
        "after": (None, flat({"logprobs": 0})),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(engine_outputs.ROUNDS):
        for name, (texts, params) in ways.items():
            seconds[name].append(engine_outputs._seconds(texts, params, steps))
    count = engine_outputs.TOKENS * engine_outputs.SEQUENCES
    return {name: 1e6 * float(np.median(of_way)) / count for name, of_way in seconds.items()}


def threads() -> dict[str, int]:
    """Of a trainer on a node of 96 cores and 8 GPUs, two of them, with the driver on a head of 8 cores."""
    spec: Any = SimpleNamespace(cpus_per_slot=96 / 8)
    table: Any = (SimpleNamespace(gpu_uuid="GPU-0"),)
    group: Any = None
    slots = Slots("run", spec, group, 1, table)
    return {"before": max(1, 8 // 16), "after": threads_of(slots, "actor")}


def requests_per_slot() -> dict[str, float]:
    """Requests that Serve lets an engine have, per request that it computes at once."""
    settings = EngineSettings({}, {}, None, 60.0, 60.0)
    slots: Any = None
    bound: Any = rollout_deployment(settings, slots, num_engines=8, max_requests=256)
    return {"before": 1.0, "after": bound._bound_deployment.max_ongoing_requests / 256}


def cached_turns() -> dict[str, float]:
    """Share of the later turns of sessions that go to the engine with their prefix: of 512 sessions of five
    turns on eight engines; with the router's choice, and with a choice of the shorter queue of two.
    """

    async def share(is_sticky: bool) -> float:
        random.seed(0)
        router: Any = StickyRouter.__new__(StickyRouter)
        router._replica_of = sticky_router.OrderedDict()
        router._replicas = {name: name for name in range(ENGINES)}
        at: dict[str, int] = {}
        hits = 0
        for turn in range(TURNS):
            queues = [0] * ENGINES
            for number in range(SESSIONS):
                session = f"session {number}" if is_sticky else ""
                metadata = SimpleNamespace(session_id=session)
                request: Any = SimpleNamespace(
                    metadata=metadata, routing_context=SimpleNamespace(should_backoff=False)
                )
                [candidates] = await router.choose_replicas(list(range(ENGINES)), request)
                chosen = min(candidates, key=queues.__getitem__)
                queues[chosen] += 1
                router.on_request_routed(request, chosen, None)
                hits += turn > 0 and at.get(f"{number}") == chosen
                at[f"{number}"] = chosen
        return hits / (SESSIONS * (TURNS - 1))

    return {"before": asyncio.run(share(False)), "after": asyncio.run(share(True))}


def settings() -> dict[str, Any]:
    """Of the shipped configs for eight GPUs."""
    folder = REPOSITORY / "jobs" / "configs"
    config, asynchronous = (
        load_config(PolicyRunConfig, [str(folder / name)])
        for name in ("grpo-8x-gpu.yaml", "async-8x-gpu.yaml")
    )
    return {
        "backend": process_group.ON_GPUS,
        "batch_tokens": config.rollout.batch_tokens,
        "running_requests": asynchronous.rollout.weight_sync.running,
        "chunk": GPU_CHUNK,
        "grad_accum_dtype": config.train.grad_accum_dtype,
    }


def measure() -> dict[str, Any]:
    return {
        "published_bytes": published_bytes(),
        "offloaded_bytes": offloaded_bytes(),
        "output_microseconds": output_microseconds(),
        "threads": threads(),
        "requests_per_slot": requests_per_slot(),
        "cached_turns": cached_turns(),
        "settings": settings(),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
