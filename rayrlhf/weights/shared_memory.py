"""Memory that another process on the device reads in place: CUDA IPC on a GPU, a memory file on a CPU."""

from __future__ import annotations

import json
import os
import weakref
from typing import Any

import ray
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

MAX_HANDLE_BYTES = 2**18  # expandable segments have one for every 20 MiB
MEMORY_FILE = "/memfd:weights"


def device_key(device: torch.device) -> str:
    """A name of the device's memory that is the same in every process: the GPU's UUID, or Ray's node."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return ray.get_runtime_context().get_node_id()


class SharedBuffer:
    """`flat`, uint8 [num_bytes], is readable elsewhere through `handle` as long as this object lives."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.handle: bytes  # JSON: numbers, and the driver's handles as hexadecimal digits
        if device.type == "cuda":
            self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.handle = _pack_cuda(self.flat)
            return
        # A file without a name: nothing is left behind, whoever dies, and no other user can open it.
        file = os.memfd_create("weights")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, num_bytes)
        self.handle = json.dumps({"memory": "file", "pid": os.getpid(), "file": file}).encode()
        self.flat = _map_file(os.getpid(), file, num_bytes)


def attach(handle: bytes, device: torch.device, num_bytes: int) -> Tensor:
    """The buffer as seen from this process; to be let go of before the other one fills it again.

    Raises `ValueError` for a handle that does not describe exactly `num_bytes` of weights, `OSError` where
    the memory is gone.
    """
    fields = _fields(handle)
    if device.type == "cuda":
        return _attach_cuda(fields, device, num_bytes)
    if fields.keys() != {"memory", "pid", "file"} or fields["memory"] != "file":
        raise ValueError(f"a handle with the fields {sorted(fields)} is none of a memory file")
    return _map_file(_number(fields, "pid"), _number(fields, "file"), num_bytes)


def _fields(handle: bytes) -> dict[str, Any]:
    if len(handle) > MAX_HANDLE_BYTES:
        raise ValueError(f"a handle of {len(handle)} bytes is too long")
    try:
        fields = json.loads(handle)
    except ValueError as error:
        raise ValueError(f"a handle that is no JSON: {handle[:32]!r}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a handle that is no JSON object but {type(fields).__name__}")
    return fields


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"a handle whose {name} is {value!r}, not a number from 0")
    return value


def _hex(fields: dict[str, Any], name: str) -> bytes:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"a handle whose {name} is {value!r}, not hexadecimal digits")
    return bytes.fromhex(value)


def _map_file(pid: int, file: int, num_bytes: int) -> Tensor:
    path = f"/proc/{pid}/fd/{file}"
    # Mapping a file that is shorter would make it longer, and one that is no memory file would change it.
    if not os.readlink(path).startswith(MEMORY_FILE):
        raise ValueError(f"{path} is no memory file of weights")
    found = os.stat(path)
    if found.st_uid != os.geteuid() or found.st_size != num_bytes:
        raise ValueError(
            f"{path} has {found.st_size} bytes of user {found.st_uid}, not {num_bytes} of {os.geteuid()}"
        )
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


# What torch's `reduce_tensor` describes a CUDA tensor by, in the order of `rebuild_cuda_tensor`'s arguments:
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
        raise ValueError(f"a handle with the fields {sorted(fields)} is none of CUDA memory")
    offset, storage_bytes = _number(fields, "offset"), _number(fields, "storage_bytes")
    if offset + num_bytes > storage_bytes:
        raise ValueError(f"a handle of {storage_bytes} bytes does not hold {num_bytes} from {offset} on")
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
