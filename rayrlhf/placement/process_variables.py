"""Environment variables of the processes of trainers and engines, and how many threads each has."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from rayrlhf.hub.access import offline_variable
from rayrlhf.placement.preload import preloading

if TYPE_CHECKING:
    from rayrlhf.placement.slots import Slots

# Threads of a waiting role must not spin on cores that another role needs.
BLOCK_TIME = {"KMP_BLOCKTIME": "1"}


def threads_each(processes: int) -> int:
    """Threads per process when `processes` processes share all cores of a node."""
    return max(1, (os.cpu_count() or 1) // processes)


def threads_of(slots: Slots, *roles: str) -> int:
    """Threads of each process of these roles, which compute at the same time: a slot's CPUs with GPUs, and
    else an equal share of the cores of the node that has most of them.
    """
    if slots.have_gpus:
        return max(1, int(slots.spec.cpus_per_slot))
    nodes = Counter(
        slots.of(role, unit).node for role in roles for unit in range(len(slots.spec.of(role).units))
    )
    return threads_each(max(nodes.values()))


def trainer_variables(threads: int, loop: str, *, on_gpu: bool) -> dict[str, str]:
    """Of a training worker; `loop` is the module of the function that it runs."""
    return {
        **offline_variable(),
        **preloading(loop),
        **({} if on_gpu else memory_allocation()),
        **BLOCK_TIME,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def memory_allocation() -> dict[str, str]:
    """Settings of glibc's malloc for a process that computes on CPUs: huge pages, where the kernel gives them
    on request (the default of most), and freed memory is kept for the next step.

    Gradients, logits and activations are allocated in every step. By default malloc gives large pieces back
    to the kernel, which clears each page again at its next use: 11 % of a step on two virtual cores (SFT
    of SmolLM2-135M: 98 tokens/s, 110 without it). Only the main arena keeps more than 64 MiB: hence one.
    """
    settings = {
        "hugetlb": 1,
        "arena_max": 1,
        "mmap_threshold": 4 * 2**30,
        "trim_threshold": 2**40,
    }
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": tunables}


def engine_variables() -> dict[str, str]:
    """Of every vLLM engine."""
    return {
        **offline_variable(),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def cpu_engine_variables(threads: int) -> dict[str, str]:
    """Of a vLLM engine on a CPU."""
    return {
        **engine_variables(),
        **preloading("rayrlhf.rollout.vllm_engine"),
        **memory_allocation(),
        **BLOCK_TIME,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" binds every engine of a node to the same core
        "TORCH_COMPILE_DISABLE": "1",  # saves a 20 s compilation at the first request
    }
