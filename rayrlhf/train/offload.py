"""Offloads gradients, master weights and optimizer states to host memory while rollout engines use the GPU.

The weights stay on the device, because they are pushed to the engines next. DeepSpeed offloads the states of
ZeRO 1 and 2; for ZeRO 3 it does so only with its own compiled Adam, and for ZeRO 0 not at all: those are
offloaded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from torch import Tensor

from rayrlhf.train.device_memory import to_device, to_host

GRADIENTS = [OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer]
MASTER_AND_MOMENTS = [OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states]


def offload_states(engine: Any) -> int:
    """Free the gradients and move fp32 master weights and optimizer states to the host; idempotent. Returns
    the bytes freed on the device.
    """
    num_bytes = free_gradients(engine)
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.offload_states(include=[*MASTER_AND_MOMENTS, *GRADIENTS], pin_memory=on_gpu)
    else:
        if stage == 3 and not _weights_are_on_host(engine):
            engine.offload_states(include=GRADIENTS, pin_memory=on_gpu)
        to_host(_own_states(engine), host_buffers(engine), pinned=on_gpu)
    if on_gpu:
        torch.cuda.empty_cache()
        num_bytes += before - torch.cuda.memory_allocated()
    return num_bytes


def reload_states(engine: Any) -> None:
    """Move the states back to the device; a no-op if they are there."""
    stage = engine.zero_optimization_stage()
    if stage > 0 and not _weights_are_on_host(engine):
        engine.reload_states()
    if stage in (0, 3) and not engine.zero_use_cpu_optimizer():
        to_device(_own_states(engine), engine.device)


def host_buffers(engine: Any) -> list[Tensor]:
    """Of the engine's states, in their order; they are made once: pinning memory takes as long as copying it
    ten times.
    """
    if not hasattr(engine, "host_buffers"):
        engine.host_buffers = []
    return engine.host_buffers


def _weights_are_on_host(engine: Any) -> bool:
    """True with parameter offload: the gradients are on the host too, and DeepSpeed has nothing to move."""
    offload = engine.zero_offload_param()
    return offload is not None and offload.device != OffloadDeviceEnum.none


def _own_states(engine: Any) -> Iterator[Tensor]:
    """The states that are offloaded here: the moments, and the partitions of ZeRO 3's master weights."""
    if engine.zero_use_cpu_optimizer():
        return  # on the host already
    if engine.zero_optimization_stage() == 3:
        yield from engine.optimizer.fp32_partitioned_groups_flat
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        # The step counter stays on the device where the fused kernel needs it.
        yield from (value for value in state.values() if torch.is_tensor(value) and value.dim() > 0)


def free_gradients(engine: Any) -> int:
    """Free the gradients on the parameters, which the optimizer step has used. Returns their bytes."""
    freed = 0
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            freed += parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None
    return freed
