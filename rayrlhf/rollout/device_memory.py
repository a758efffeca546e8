"""Memory that another process on the device reads in place: CUDA IPC on a GPU, a memory file on a CPU."""

from __future__ import annotations

import os
import weakref
from typing import Any

import ray
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the device's number, which differs from process to process


def device_key(device: torch.device) -> str:
    """A name of the device's memory that is the same in every process: the GPU's UUID, or Ray's node."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return ray.get_runtime_context().get_node_id()


class SharedBuffer:
    """`flat`, uint8 [num_bytes], is readable elsewhere through `handle` as long as this object lives."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.handle: Any  # can be pickled
        if device.type == "cuda":
            self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.handle = reduce_tensor(self.flat)
            return
        # A file without a name: nothing is left behind, whoever dies.
        file = os.memfd_create("weights")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, num_bytes)
        self.handle = (os.getpid(), file, num_bytes)
        self.flat = attach(self.handle, device)


def attach(handle: Any, device: torch.device) -> Tensor:
    """The buffer as seen from this process; to be let go of before the other one fills it again."""
    if device.type == "cuda":
        rebuild, arguments = handle
        here = list(arguments)
        here[DEVICE_ARGUMENT] = torch.cuda.current_device() if device.index is None else device.index
        return rebuild(*here)
    pid, file, num_bytes = handle
    return torch.from_file(f"/proc/{pid}/fd/{file}", shared=True, size=num_bytes, dtype=torch.uint8)
