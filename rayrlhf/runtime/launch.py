"""Starts a job: a local Ray, and in it the processes of trainers and engines, while the driver still imports.

Importing torch, transformers, DeepSpeed and vLLM takes each process five to fifteen seconds of CPU. In turn
(driver, then Ray, then its workers), that would be most of the time before the first step.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from rayrlhf.untrusted_text import write_line

INTERRUPTED = 130


def launch(driver: str, config: Any) -> int:
    """Run a job's driver, "module:function", and return its exit code. Without RAY_ADDRESS it gets a local
    Ray, whose processes start while the driver imports its modules and checks the job.
    """
    try:
        return _launch(driver, config)
    except KeyboardInterrupt:  # the driver itself handles those that come later
        write_line("interrupted before the run began", sys.stderr)
        return INTERRUPTED


def _launch(driver: str, config: Any) -> int:
    with ExitStack() as stack:
        started = None
        from rayrlhf.runtime.local_ray import is_local, local_ray  # imports ray

        if is_local(os.environ.get("RAY_ADDRESS")):
            from rayrlhf.placement.preload import enable
            from rayrlhf.placement.reaper import NAMESPACE

            enabled = enable()  # first, as Ray's processes inherit the environment
            started = stack.enter_context(local_ray(NAMESPACE))
            if enabled:
                _prestart(config)
        module, _, function = driver.partition(":")
        return getattr(import_module(module), function)(config, started)


def _prestart(config: Any) -> None:
    """Processes of data tasks, trainers and engines, in the order in which they are needed."""
    from rayrlhf.placement.preload import TOKENIZERS, preloading, prestart
    from rayrlhf.placement.process_variables import cpu_engine_variables, threads_each, trainer_variables
    from rayrlhf.placement.slot_controller import train_variables

    limit = os.cpu_count() or 1
    train, rollout = getattr(config, "train", None), getattr(config, "rollout", None)
    prestart(preloading(TOKENIZERS), 1)
    if train is not None:
        loops = {"rayrlhf.supervised.loop" if rollout is None else "rayrlhf.policy.loop": train.num_workers}
        if rollout is not None and config.critic_is_separate:
            loops["rayrlhf.policy.critic_server"] = config.num_critic_workers
        threads = train.num_threads or threads_each(sum(loops.values()))
        for loop, count in loops.items():
            prestart(train_variables() | trainer_variables(threads, loop, on_gpu=False), min(count, limit))
    if rollout is not None:
        threads = rollout.num_threads or threads_each(rollout.num_engines)
        prestart(cpu_engine_variables(threads), min(rollout.num_engines, limit))
