"""Starts a job: a local Ray, and in it the processes of trainers and engines, while the driver still imports.

Importing torch, transformers, DeepSpeed and vLLM takes each process five to fifteen seconds of CPU. In turn
(driver, then Ray, then its workers), that would be most of the time before the first step.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib import import_module
from typing import Any


def launch(driver: str, config: Any) -> int:
    """Run a job's driver, "module:function", and return its exit code. Without RAY_ADDRESS it gets a local
    Ray, whose processes start while the driver imports its modules and checks the job.
    """
    with ExitStack() as stack:
        started = None
        from rayrlhf.runtime.local_ray import is_local, local_ray  # imports ray

        if is_local(os.environ.get("RAY_ADDRESS")):
            from rayrlhf.placement.preload import preloading
            from rayrlhf.placement.reaper import NAMESPACE

            started = stack.enter_context(local_ray(NAMESPACE))
            if preloading(""):
                _prestart(config)
        module, _, function = driver.partition(":")
        return getattr(import_module(module), function)(config, started)


def _prestart(config: Any) -> None:
    """The processes of trainers, their controller and engines, in the order in which they are needed."""
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    from rayrlhf.placement.preload import prestart
    from rayrlhf.placement.process_variables import cpu_engine_variables, threads_each, trainer_variables
    from rayrlhf.placement.slot_controller import controller_variables

    train, rollout = getattr(config, "train", None), getattr(config, "rollout", None)
    if train is not None:
        loops = {"rayrlhf.supervised.loop" if rollout is None else "rayrlhf.policy.loop": train.num_workers}
        if rollout is not None and config.critic_is_separate:
            loops["rayrlhf.policy.critic_server"] = config.num_critic_workers
        threads = train.num_threads or threads_each(sum(loops.values()))
        for loop, count in loops.items():
            prestart(get_env_vars_to_propagate() | trainer_variables(threads, loop), count)
        prestart(controller_variables(), 1)
    if rollout is not None:
        threads = rollout.num_threads or threads_each(rollout.num_engines)
        prestart(cpu_engine_variables(threads), rollout.num_engines)
