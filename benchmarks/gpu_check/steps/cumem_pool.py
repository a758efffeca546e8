"""Memory at fixed addresses whose physical pages come and go, by the allocator of vLLM's sleeping engines.

It is a small extension module: vLLM's own where vLLM for CUDA is installed, else built from its
csrc/cumem_allocator.cpp (with cumem_allocator_compat.h), in a folder given by --cumem.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.step import Skip

NAME = "cumem_allocator"
Handle = tuple[int, int, int, int]  # device, bytes, address, address of the driver's handle


def find_extension(folder: Path | None) -> Path:
    """The extension's file. Raises `Skip` if there is none and nothing to build it from."""
    try:
        installed = importlib.util.find_spec(f"vllm.{NAME}")
    except ModuleNotFoundError:
        installed = None
    if installed is not None and installed.origin is not None:
        return Path(installed.origin)
    if folder is None:
        raise Skip("vLLM for CUDA is not installed, and --cumem names no folder with its cumem_allocator.cpp")
    if not (folder / f"{NAME}.cpp").is_file():
        raise Skip(f"{folder} has no {NAME}.cpp")
    return build(folder)


def build(folder: Path) -> Path:
    """Compile the source in this folder, next to it."""
    compiler, headers = shutil.which("c++") or shutil.which("g++"), _cuda_headers()
    if compiler is None or headers is None:
        raise Skip(f"building {NAME}.cpp needs {'a C++ compiler' if compiler is None else 'cuda.h'}")
    target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [sysconfig.get_paths()["include"], str(headers), str(folder)]
    # The driver's functions are found when the module is loaded: no stub of libcuda is needed to link.
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", *(f"-I{each}" for each in includes)]
    subprocess.run([*command, str(folder / f"{NAME}.cpp"), "-o", str(target)], check=True, timeout=100)
    return target


def _cuda_headers() -> Path | None:
    """The CUDA toolkit's folder with cuda.h, or Triton's, which comes with torch for CUDA."""
    from torch.utils.cpp_extension import CUDA_HOME

    folders = [] if CUDA_HOME is None else [Path(CUDA_HOME) / "include"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)


def load(path: Path) -> Any:
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CumemPool:
    """One per process: the extension has a single pair of callbacks."""

    def __init__(self, path: Path) -> None:
        self.extension = load(path)
        self.handles: dict[int, Handle] = {}  # by address
        self.tags: dict[int, str] = {}
        self.asleep: set[int] = set()
        self.tag = ""
        self.callbacks = (self._allocated, self._freed)  # which the extension does not keep alive
        self.extension.init_module(*self.callbacks)
        self.allocator = torch.cuda.memory.CUDAPluggableAllocator(str(path), "my_malloc", "my_free")
        self.pools: list[Any] = []  # https://github.com/pytorch/pytorch/issues/146431

    def tensors(self, tag: str, count: int, num_bytes: int) -> list[Tensor]:
        """`count` tensors, each with physical memory of its own."""
        pool = torch.cuda.MemPool(self.allocator.allocator())
        self.pools.append(pool)
        self.tag = tag
        with torch.cuda.use_mem_pool(pool):
            return [torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(count)]

    def sleep(self) -> None:
        """Give all physical memory back; what it held is lost."""
        torch.cuda.synchronize()
        for address in self.handles.keys() - self.asleep:
            self.extension.python_unmap_and_release(*self.handles[address])
            self.asleep.add(address)

    def wake(self, tag: str) -> None:
        """Raises `RuntimeError` when the GPU has no memory left; what could be mapped stays so."""
        for address in [each for each in sorted(self.asleep) if self.tags[each] == tag]:
            self.extension.python_create_and_map(*self.handles[address])
            self.asleep.discard(address)

    def _allocated(self, handle: Handle) -> None:
        address = handle[2]
        self.handles[address], self.tags[address] = handle, self.tag

    def _freed(self, address: int) -> Handle:
        self.tags.pop(address)
        self.asleep.discard(address)
        return self.handles.pop(address)
