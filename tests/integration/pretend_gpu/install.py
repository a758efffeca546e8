"""Lets a process pretend: changes to modules of the product, made when they are imported."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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

ENGINE_MODULE = "rayrlhf.rollout.vllm_engine"


def ledger() -> Ledger:
    return Ledger(settings().folder, CAPACITY)


def this_gpu() -> str:
    """The GPU that Ray has counted for this process."""
    import ray

    context = ray.get_runtime_context()
    return f"{context.get_node_id()[:6]}-gpu{context.get_accelerator_ids()['GPU'][0]}"


def take(who: str, what: str, num_bytes: int) -> None:
    ledger().take(this_gpu(), who, what, num_bytes)


def give(who: str, what: str) -> int:
    return ledger().give(this_gpu(), who, what)


def install() -> None:
    sys.meta_path.insert(0, _Finder())


def _slots(module: Any) -> None:
    def nvidia_smi(query: str, *options: str) -> str:
        return f"{CAPACITY >> 20}\n" if query == "memory.total" else f"GPU-{'-'.join(options)}\n"

    module._nvidia_smi = nvidia_smi


def _run(module: Any) -> None:
    config = module.TorchConfig
    module.TorchConfig = lambda backend, **options: config(backend="gloo", **options)


def _setup(module: Any) -> None:
    make_actor = module.make_actor

    def loaded(config: Any) -> Any:
        take("trainer", "weights", TRAINER_WEIGHTS)
        take("trainer", "states", TRAINER_STATES)
        time.sleep(settings().load_seconds)
        return make_actor(config)

    module.make_actor = loaded


def _learner(module: Any) -> None:
    before(module.Learner, "offload", lambda: give("trainer", "states"))
    before(module.Learner, "reload", lambda: take("trainer", "states", TRAINER_STATES))


def _sync(module: Any) -> None:
    before(module.WeightSync, "_push", lambda: take("trainer", "push buffers", PUSH_BUFFERS))


def _colocation(module: Any) -> None:
    module.release_cached_memory = lambda: give("trainer", "push buffers")


def _served(who: str, name: str, module: Any) -> None:
    def load() -> None:
        take(who, "model", SERVED_MODEL)
        time.sleep(settings().load_seconds)

    before(getattr(module, name), "__init__", load)


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
    "rayrlhf.runtime.run": _run,
    "rayrlhf.policy.setup": _setup,
    "rayrlhf.train.learner": _learner,
    "rayrlhf.weights.sync": _sync,
    "rayrlhf.policy.colocation": _colocation,
    "rayrlhf.reward.model_deployment": functools.partial(_served, "reward model", "ScoreActor"),
    "rayrlhf.train.frozen_server": functools.partial(_served, "reference", "ReferenceActor"),
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == ENGINE_MODULE:
            return importlib.util.spec_from_file_location(fullname, Path(__file__).parent / "engine.py")
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
