"""Buffers that another process on the same device reads in place: CUDA IPC on GPU, memfd on CPU."""

from __future__ import annotations

import json
import os
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

MAX_HANDLE_BYTES = 2**18  # expandable segments have one handle per 20 MiB
MEMORY_FILE = "/memfd:weights"


def device_key(device: torch.device) -> str:
    """Process-independent identifier of the device's memory: the GPU's UUID, or Ray's node id on CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    import ray  # seconds, and not everywhere installed where GPUs are checked

    return ray.get_runtime_context().get_node_id()


class SharedBuffer:
    """`flat`, uint8 [num_bytes], which other processes open through `handle` while this object lives."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.handle: bytes  # JSON: numbers, and the CUDA driver's handles in hex
        if device.type == "cuda":
            self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.handle = _pack_cuda(self.flat)
            return
        # An unnamed file: nothing is left behind if either process dies, and no other user can open it.
        file = os.memfd_create("weights")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, num_bytes)
        self.handle = json.dumps({"memory": "file", "pid": os.getpid(), "file": file}).encode()
        self.flat = _map_file(os.getpid(), file, num_bytes)


def attach(handle: bytes, device: torch.device, num_bytes: int) -> Tensor:
    """Map the buffer into this process. Release it before the owner fills it again.

    Returns:
        uint8 [num_bytes].

    Raises:
        ValueError: if the handle does not describe exactly `num_bytes` of weights.
        OSError: if the memory no longer exists.
    """
    fields = _fields(handle)
    if device.type == "cuda":
        return _attach_cuda(fields, device, num_bytes)
    if fields.keys() != {"memory", "pid", "file"} or fields["memory"] != "file":
        raise ValueError(f"a handle with the fields {sorted(fields)} is not one of a memory file")
    return _map_file(_number(fields, "pid"), _number(fields, "file"), num_bytes)


def _fields(handle: bytes) -> dict[str, Any]:
    if len(handle) > MAX_HANDLE_BYTES:
        raise ValueError(f"a handle of {len(handle)} bytes is too long")
    try:
        fields = json.loads(handle)
    except ValueError as error:
        raise ValueError(f"a handle that is not JSON: {handle[:32]!r}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a handle that is not a JSON object but {type(fields).__name__}")
    return fields


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"a handle whose {name} is {value!r}, not a number >= 0")
    return value


def _hex(fields: dict[str, Any], name: str) -> bytes:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"a handle whose {name} is {value!r}, not a hex string")
    return bytes.fromhex(value)


def _map_file(pid: int, file: int, num_bytes: int) -> Tensor:
    path = f"/proc/{pid}/fd/{file}"
    # torch.from_file would extend a shorter file, and would modify a file that is not a memfd.
    if not os.readlink(path).startswith(MEMORY_FILE):
        raise ValueError(f"{path} is not a memory file of weights")
    status = os.stat(path)
    if status.st_uid != os.geteuid() or status.st_size != num_bytes:
        raise ValueError(
            f"{path} has {status.st_size} bytes of user {status.st_uid}, not {num_bytes} of {os.geteuid()}"
        )
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


# Fields of torch's `reduce_tensor` for a CUDA tensor -> index among the arguments of `rebuild_cuda_tensor`:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/multiprocessing/reductions.py. The class, the dtype,
# the device and the gradient are known here, and are not taken from a handle.
_CUDA_FIELDS = {
    "offset": 3,
    "storage": 7,
    "storage_bytes": 8,
    "storage_offset_bytes": 9,
    "ref_counter": 11,
    "ref_counter_offset": 12,
    "event": 13,
    "event_sync_required": 14,
}
_CUDA_HANDLES = ("storage", "ref_counter", "event")


def _pack_cuda(flat: Tensor) -> bytes:
    rebuild, arguments = reduce_tensor(flat)
    assert rebuild is rebuild_cuda_tensor
    fields: dict[str, Any] = {name: arguments[index] for name, index in _CUDA_FIELDS.items()}
    fields |= {name: fields[name].hex() for name in _CUDA_HANDLES}
    fields["event_sync_required"] = bool(fields["event_sync_required"])
    return json.dumps({"memory": "cuda", **fields}).encode()


def _attach_cuda(fields: dict[str, Any], device: torch.device, num_bytes: int) -> Tensor:
    if fields.keys() != {"memory", *_CUDA_FIELDS} or fields["memory"] != "cuda":
        raise ValueError(f"a handle with the fields {sorted(fields)} is not one of CUDA memory")
    offset, storage_bytes = _number(fields, "offset"), _number(fields, "storage_bytes")
    if offset + num_bytes > storage_bytes:
        raise ValueError(f"a handle of {storage_bytes} bytes does not hold {num_bytes} from offset {offset}")
    here = torch.cuda.current_device() if device.index is None else device.index
    return rebuild_cuda_tensor(
        Tensor,
        torch.Size([num_bytes]),
        (1,),
        offset,
        torch.storage.TypedStorage,
        torch.uint8,
        here,
        _hex(fields, "storage"),
        storage_bytes,
        _number(fields, "storage_offset_bytes"),
        False,
        _hex(fields, "ref_counter"),
        _number(fields, "ref_counter_offset"),
        _hex(fields, "event"),
        fields["event_sync_required"] is True,
    )
