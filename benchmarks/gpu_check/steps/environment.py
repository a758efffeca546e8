"""What is there: versions, memory, kernels, and the rates that other steps are compared with."""

from __future__ import annotations

import importlib
import inspect
import os
import resource
import shutil
import subprocess

import torch
import torch.cuda.nccl as nccl

from benchmarks.gpu_check.measure import seconds_of
from benchmarks.gpu_check.runner import is_installed
from benchmarks.gpu_check.step import GIB, Context, Skip


def run(context: Context) -> None:
    _record_kernels(context)
    _record_host(context)
    if context.on_gpu:
        _record_gpu(context)
    _record_rates(context)


def _record_kernels(context: Context) -> None:
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ModuleNotFoundError:
        raise Skip(
            f"torch {torch.__version__} has no torch.nn.attention.varlen, which rayrlhf uses"
        ) from None
    context.record("varlen_attn takes", ", ".join(inspect.signature(varlen.varlen_attn).parameters))
    attention = importlib.import_module("torch.nn.attention")
    if hasattr(attention, "list_flash_attention_impls"):
        context.record("flash attention implementations", ", ".join(attention.list_flash_attention_impls()))
    context.record("flash_attn is installed", is_installed("flash_attn"))


def _record_host(context: Context) -> None:
    context.record("cores", len(os.sched_getaffinity(0)))
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    context.record("host memory available", pages * size / GIB, "GiB")
    if os.path.isdir("/dev/shm"):
        context.record("/dev/shm available", shutil.disk_usage("/dev/shm").free / GIB, "GiB")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    context.record("lockable memory", "unlimited" if unlimited else locked / GIB, "" if unlimited else "GiB")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:
            context.record(name, os.environ[name])
    compiler = shutil.which("nvcc")
    if compiler is not None:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20)
        context.record("nvcc", said.stdout.strip().splitlines()[-1] if said.stdout.strip() else "no answer")


def _record_gpu(context: Context) -> None:
    free, total = torch.cuda.mem_get_info(context.device)
    context.record("memory", total / GIB, "GiB")
    context.record("memory free", free / GIB, "GiB")
    properties = torch.cuda.get_device_properties(context.device)
    context.record("compute capability", f"{properties.major}.{properties.minor}")
    context.record("multiprocessors", properties.multi_processor_count)
    context.record("CUDA of torch", str(torch.version.cuda))
    context.record("NCCL", ".".join(map(str, nccl.version())))
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is not None:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20)
        context.record(
            "driver, highest clock", said.stdout.strip().splitlines()[0] if said.stdout else "none"
        )


def _record_rates(context: Context) -> None:
    """Of a large matrix product and of a copy: the ceilings here, whatever a data sheet says."""
    size, num_bytes = (8192, 4 * GIB) if context.on_gpu else (512, GIB // 64)
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    left, right = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
    seconds = seconds_of(lambda: left @ right, context.device)
    context.record(
        f"matrix product, {str(dtype).removeprefix('torch.')}", 2e-12 * size**3 / seconds, "TFLOP/s"
    )
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), context.device)
    context.record("copy, read and written", 2e-9 * num_bytes / seconds, "GB/s")
