"""Receiver side of weight sync, inside vLLM's worker process.

vLLM imports this module in every worker process because `worker_extension_cls` names `WorkerExtension`; the
import registers the transfer backend. Only the modules `rollout.vllm_*` may import vllm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from rayrlhf.models.cpu_products import use_fastest_products
from rayrlhf.rollout.engine_settings import MAY_ROUND_PRODUCTS
from rayrlhf.rollout.vllm_adapter import (
    AdapterUpdate,
    multiply_all_tokens_at_once,
    put_on_adapters,
    take_off_adapters,
)
from rayrlhf.rollout.vllm_cpu_kernels import (
    PackedLinears,
    fuse_norms,
    keep_parameters,
    rotate_parts_by_torch,
)
from rayrlhf.rollout.vllm_reload import Reload, pack_experts_at_every_load
from rayrlhf.rollout.vllm_routes import RouteRecorder, moe_layers_of
from rayrlhf.rollout.vllm_verify import Arrivals
from rayrlhf.weights.buckets import check, size_of, unpack
from rayrlhf.weights.shared_memory import device_key
from rayrlhf.weights.store import AdapterSpec, TensorSlice
from rayrlhf.weights.transfer_group import Link, TransferGroup, join

BUCKETS = "rayrlhf_buckets"

if current_platform.is_cpu():
    keep_parameters()
    fuse_norms()
    rotate_parts_by_torch()
    pack_experts_at_every_load()
    multiply_all_tokens_at_once()


@dataclass
class BucketInit(WeightTransferInitInfo):
    transfer_group: TransferGroup
    first_rank: int  # in the group, of this engine's first worker


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    slices: Sequence[TensorSlice]
    bucket: Any = None  # uint8 array, read-only, shared with the object store; None: received over the link


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):
    """Loads buckets of tensors in checkpoint format, and requires that every parameter is loaded."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate
    link: Link | None = None
    reload: Reload
    arrivals: Arrivals | None = None  # of the current or last update, if it is to be verified

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.packed = PackedLinears(model, rounds=_rounds_products(vllm_config))
        self.packed.reset()

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self.link = None
        rank = init_info.first_rank + self.parallel_config.rank
        self.link = join(init_info.transfer_group, rank=rank, device=self.device, key=device_key(self.device))

    def start_weight_update(self) -> None:
        self.packed.reset()
        take_off_adapters(self.model)
        self.reload = Reload(self.model)
        self.reload.start()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        model: Any = self.model
        with self.received(update_info) as flat:
            pieces = unpack(update_info.slices, flat)
            arrivals = self.arrivals
            loaded = model.load_weights(pieces) if arrivals is None else arrivals.load(model, pieces)
            self.reload.collected(loaded, flat)

    @contextmanager
    def received(self, update_info: BucketUpdate) -> Iterator[Tensor]:
        """The bytes of a bucket, valid inside the context."""
        check(update_info.slices)
        if update_info.bucket is not None:
            yield torch.from_numpy(update_info.bucket)
            return
        assert self.link is not None
        yield self.link.receive(size_of(update_info.slices))
        self.link.release()

    def finish_weight_update(self) -> None:
        self.reload.finish(self.model_config)
        self.packed.reset()
        put_on_adapters(self.model)

    def shutdown(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.end("an engine shut down")


def _rounds_products(vllm_config: Any) -> bool:
    """Set the process's products to bf16 where these are allowed and faster."""
    allowed = current_platform.is_cpu() and vllm_config.additional_config.get(MAY_ROUND_PRODUCTS, False)
    return allowed and use_fastest_products(vllm_config.model_config.hf_config).bf16


class WorkerExtension:
    """Mixin for vLLM's worker class, named in `worker_extension_cls`."""

    def device_key(self) -> str:
        worker: Any = self
        return device_key(worker.device)

    def record_arrivals(self, *, verify: bool) -> None:
        """Whether the next weight update is to be verified."""
        worker: Any = self
        worker.weight_transfer_engine.arrivals = Arrivals() if verify else None

    def differences(self, checksums: Mapping[str, int]) -> dict[str, str]:
        """What is wrong with the tensors of the last weight update, by name; empty if nothing is."""
        worker: Any = self
        arrivals: Arrivals | None = worker.weight_transfer_engine.arrivals
        if arrivals is None:
            raise RuntimeError("the last weight update was not recorded: it cannot be verified")
        is_sharded = worker.parallel_config.tensor_parallel_size > 1
        return arrivals.differences(worker.model_runner.model, checksums, is_sharded=is_sharded)

    def start_adapter_update(self) -> None:
        worker: Any = self
        self.adapter_update = AdapterUpdate(worker.model_runner)

    def update_adapter(self, slices: Sequence[TensorSlice], bucket: Any) -> None:
        worker: Any = self
        with worker.weight_transfer_engine.received(BucketUpdate(slices, bucket)) as flat:
            self.adapter_update.collect(unpack(slices, flat))

    def finish_adapter_update(self, request: LoRARequest, spec: AdapterSpec) -> None:
        self.adapter_update.finish(request, spec)
        del self.adapter_update

    def leave_transfer_group(self) -> None:
        """Close the connections; members that wait in a collective are unblocked."""
        worker: Any = self
        worker.weight_transfer_engine.shutdown()

    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts, whose routing decisions are recorded from here on."""
        worker: Any = self
        if current_platform.is_cpu():
            self.routes = RouteRecorder(worker.model_runner)
            return self.routes.layer_ids
        return moe_layers_of(worker.model_runner.model)

    def take_routes(self, request_id: str) -> np.ndarray | None:
        """The experts of a finished request's tokens, on a CPU."""
        return self.routes.take(request_id) if current_platform.is_cpu() else None

    def release_memory(self) -> int:
        """Release weights and key-value cache; returns the freed bytes.

        All weights are pushed before the next generation, or, if pushes are of adapters alone, only these:
        then the weights are kept in host memory. On a GPU this is vLLM's sleep level 2, which keeps only the
        buffers, or 1. Its CPU worker has no sleep mode, so storages are emptied in place, and malloc, which
        keeps freed memory (`placement.process_variables.memory_allocation`), is asked to give it back.
        """
        worker: Any = self
        keeps_weights = worker.vllm_config.lora_config is not None
        if not current_platform.is_cpu():
            free, _ = torch.cuda.mem_get_info()
            worker.sleep(level=1 if keeps_weights else 2)
            return torch.cuda.mem_get_info()[0] - free
        self.emptied = {
            "weights": [] if keeps_weights else _empty(worker.model_runner.model.parameters()),
            "kv_cache": _empty(worker.model_runner.kv_caches),
        }
        copies = worker.weight_transfer_engine.packed.reset()
        _trim()
        return copies + sum(size for part in self.emptied.values() for _, size in part)

    def reacquire_memory(self, part: str) -> None:
        """
        Args:
            part: weights, of which those that are pushed must then be loaded, or kv_cache.
        """
        worker: Any = self
        if not current_platform.is_cpu():
            worker.wake_up([part])
            return
        for storage, size in self.emptied.pop(part):
            storage.resize_(size)


def _trim() -> None:
    """Give freed memory back to the kernel; only glibc's malloc keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _empty(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Free the tensors' storages; returns each distinct storage with its former size in bytes."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    sizes = [(storage, storage.size()) for storage in storages.values()]
    for storage, _ in sizes:
        storage.resize_(0)
    return sizes


if BUCKETS not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BUCKETS, BucketTransfer)
