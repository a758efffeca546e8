"""Lets a process pretend: changes to modules of the product, made when they are imported."""

from __future__ import annotations

import asyncio
import functools
import importlib.abc
import importlib.machinery
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from tests.integration.pretend_gpu import (
    CAPACITY,
    PUSH_BUFFERS,
    SERVED_MODEL,
    TRAINER_STATES,
    TRAINER_WEIGHTS,
    settings,
)
from tests.integration.pretend_gpu.ledger import Ledger

POLL_SECONDS = 0.2


def ledger() -> Ledger:
    return Ledger(settings().folder, CAPACITY)


def this_gpu() -> str:
    """The GPU that Ray has counted for this process."""
    import ray

    context = ray.get_runtime_context()
    return gpu_name(context.get_node_id(), context.get_accelerator_ids()["GPU"][0])


def gpu_name(node: str, gpu: str | None) -> str:
    return f"{node[:6]}-gpu{gpu}"


def take(who: str, what: str, num_bytes: int) -> None:
    ledger().take(this_gpu(), who, what, num_bytes)


def give(who: str, what: str) -> int:
    return ledger().give(this_gpu(), who, what)


def wait_for(gpu: str, who: str, *others: str, count: int = 1) -> None:
    """Wait for the arrival of `count` of each of the others, and a little longer."""
    for other in others:
        for seconds in until(lambda other=other: ledger().arrived(other) >= count, gpu, who, other):
            time.sleep(seconds)
    time.sleep(settings().linger_seconds)


def until(condition: Callable[[], bool], gpu: str, who: str, other: str) -> Iterator[float]:
    """Seconds to wait before the condition is looked at again. That it never holds is a problem: without it
    nothing is tested.
    """
    deadline = time.monotonic() + settings().patience_seconds
    while not condition():
        if time.monotonic() > deadline:
            ledger().problem(gpu, f"{who} waited {settings().patience_seconds:g} s in vain for {other}")
            return
        yield POLL_SECONDS


def install() -> None:
    sys.meta_path.insert(0, _Finder())


def _slots(module: Any) -> None:
    def nvidia_smi(query: str, *options: str) -> str:
        return f"{CAPACITY >> 20}\n" if query == "memory.total" else f"GPU-{'-'.join(options)}\n"

    module._nvidia_smi = nvidia_smi


def _run(module: Any) -> None:
    config = module.TorchConfig
    module.TorchConfig = lambda backend, **options: config(backend="gloo", **options)


def _memory_turns(module: Any) -> None:
    """Engines claim their turn when the reference has begun to load."""
    claim = module.Lease.claim

    async def claims(self: Any, stage: str) -> None:
        if stage == "starting":
            for seconds in until(lambda: ledger().arrived("reference") > 0, "?", self.name, "reference"):
                await asyncio.sleep(seconds)
        await claim(self, stage)

    module.Lease.claim = claims


def _rollout_engine(module: Any) -> None:
    """An engine's process has imported what it needs before its turn, so that nothing lies between the
    permission to start and the start.
    """

    def ready() -> None:
        import rayrlhf.rollout.vllm_engine  # noqa: F401

        ledger().arrive("engine", this_gpu())

    before(module.EngineActor, "__init__", ready)


def _vllm_engine(module: Any) -> None:
    from tests.integration.pretend_gpu.engine import Engine

    module.LLMEngine = Engine


def _trainer_arrives() -> None:
    """A trainer comes when all engines measure."""
    gpu, other = this_gpu(), "engine that measures"
    for seconds in until(lambda: ledger().arrived(other) >= settings().num_engines, gpu, "trainer", other):
        time.sleep(seconds)
    ledger().arrive("trainer", gpu)


def _setup(module: Any) -> None:
    make_actor = module.make_actor

    def loaded(config: Any) -> Any:
        _trainer_arrives()
        take("trainer", "weights", TRAINER_WEIGHTS)
        take("trainer", "states", TRAINER_STATES)
        time.sleep(settings().load_seconds)
        return make_actor(config)

    module.make_actor = loaded


def _learner(module: Any) -> None:
    before(module.Learner, "offload", lambda: give("trainer", "states"))
    before(module.Learner, "offload_weights", lambda: give("trainer", "weights"))

    def take_all() -> None:  # what it holds it does not take again
        take("trainer", "weights", TRAINER_WEIGHTS)
        take("trainer", "states", TRAINER_STATES)

    before(module.Learner, "reload", take_all)


def _sync(module: Any) -> None:
    before(module.WeightSync, "engines_sleep", _trainer_arrives)
    before(module.WeightSync, "_push", lambda: take("trainer", "push buffers", PUSH_BUFFERS))


def _colocation(module: Any) -> None:
    module.release_cached_memory = lambda: give("trainer", "push buffers")


def _reward_model(module: Any) -> None:
    """A replica that comes while the engine on its GPU measures."""
    start = module.ModelReward.__init__

    async def starts(self: Any, role: str, source: Any, prompt_format: Any, slots: Any) -> None:
        from ray import serve

        slot = slots.of(role, serve.get_replica_context().rank.rank)
        gpu, other = gpu_name(slot.node, slot.gpu), "engine that measures"
        for seconds in until(lambda: ledger().arrived(other, gpu) > 0, gpu, "reward model", other):
            await asyncio.sleep(seconds)
        ledger().arrive("reward model", gpu)
        await start(self, role, source, prompt_format, slots)

    module.ModelReward.__init__ = starts

    def load() -> None:
        take("reward model", "model", SERVED_MODEL)
        time.sleep(settings().load_seconds)

    before(module.ScoreActor, "__init__", load)


def _reference(module: Any) -> None:
    """A model that loads until all engines want to start."""

    def load() -> None:
        gpu = this_gpu()
        take("reference", "half of the model", SERVED_MODEL // 2)
        ledger().arrive("reference", gpu)
        time.sleep(settings().load_seconds)
        wait_for(gpu, "reference", "engine", count=settings().num_engines)
        take("reference", "rest of the model", SERVED_MODEL // 2)

    before(module.ReferenceActor, "__init__", load)


def before(owner: type, name: str, call: Callable[[], Any]) -> None:
    """Call `call` at the beginning of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        call()
        return method(*arguments, **options)

    setattr(owner, name, wrapped)


CHANGES: dict[str, Callable[[Any], None]] = {
    "rayrlhf.placement.slots": _slots,
    "rayrlhf.placement.memory_turns": _memory_turns,
    "rayrlhf.runtime.run": _run,
    "rayrlhf.rollout.engine": _rollout_engine,
    "rayrlhf.rollout.vllm_engine": _vllm_engine,
    "rayrlhf.policy.setup": _setup,
    "rayrlhf.train.learner": _learner,
    "rayrlhf.weights.sync": _sync,
    "rayrlhf.policy.colocation": _colocation,
    "rayrlhf.reward.model_deployment": _reward_model,
    "rayrlhf.train.frozen_server": _reference,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        execute, change = spec.loader.exec_module, CHANGES[fullname]

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec
