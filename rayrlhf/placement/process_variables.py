"""Environment variables of the processes of trainers and engines, and how many threads each has."""

from __future__ import annotations

import os

from rayrlhf.hub.access import offline_variable
from rayrlhf.placement.preload import preloading

# Threads of a waiting role must not spin on cores that another role needs.
BLOCK_TIME = {"KMP_BLOCKTIME": "1"}


def threads_each(processes: int) -> int:
    """Threads per process when `processes` processes share all cores of a node."""
    return max(1, (os.cpu_count() or 1) // processes)


def trainer_variables(threads: int, loop: str, *, on_gpu: bool) -> dict[str, str]:
    """Of a training worker; `loop` is the module of the function that it runs."""
    return {
        **offline_variable(),
        **preloading(loop),
        **({} if on_gpu else huge_pages()),
        **BLOCK_TIME,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def huge_pages() -> dict[str, str]:
    """glibc's malloc asks for huge pages, where the kernel gives them on request (the default of most).

    Gradients, logits and activations are new memory in every step. With pages of 4 KiB, a virtual machine
    took 0.3 s to fill 200 MB of it; with huge ones, 0.05 s.
    """
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


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
        **BLOCK_TIME,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" binds every engine of a node to the same core
        "TORCH_COMPILE_DISABLE": "1",  # saves a 20 s compilation at the first request
    }
