"""Receiver side of weight sync, inside vLLM's worker process.

vLLM imports this module in every worker process because `worker_extension_cls` names `WorkerExtension`; the
import registers the transfer backend. Only the modules `rollout.vllm_*` import vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from rayrlhf.rollout.vllm_reload import Reload, pack_experts_at_every_load
from rayrlhf.weights.buckets import check, size_of, unpack
from rayrlhf.weights.shared_memory import device_key
from rayrlhf.weights.store import TensorSlice
from rayrlhf.weights.transfer_group import Link, TransferGroup, join

BUCKETS = "rayrlhf_buckets"

if current_platform.is_cpu():
    # oneDNN keeps packed copies of the weights, which a reload does not update; a tied lm_head would continue
    # to use the old ones. Without packing, the layers are plain F.linear over the parameters that we
    # write to.
    _custom_ops._supports_onednn = False
    pack_experts_at_every_load()


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

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self.link = None
        rank = init_info.first_rank + self.parallel_config.rank
        self.link = join(init_info.transfer_group, rank=rank, device=self.device, key=device_key(self.device))

    def start_weight_update(self) -> None:
        self.reload = Reload(self.model)
        self.reload.start()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        slices = update_info.slices
        check(slices)
        if update_info.bucket is not None:
            self._load(slices, torch.from_numpy(update_info.bucket))
            return
        assert self.link is not None
        self._load(slices, self.link.receive(size_of(slices)))
        self.link.release()

    def _load(self, slices: Sequence[TensorSlice], flat: Tensor) -> None:
        model: Any = self.model
        self.reload.collected(model.load_weights(unpack(slices, flat)), flat)

    def finish_weight_update(self) -> None:
        self.reload.finish(self.model_config)

    def shutdown(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.end("an engine shut down")


class WorkerExtension:
    """Mixin for vLLM's worker class, named in `worker_extension_cls`."""

    def device_key(self) -> str:
        worker: Any = self
        return device_key(worker.device)

    def leave_transfer_group(self) -> None:
        """Close the connections; members that wait in a collective are unblocked."""
        worker: Any = self
        worker.weight_transfer_engine.shutdown()

    def release_memory(self) -> int:
        """Release weights and key-value cache; returns the freed bytes.

        Weights are not kept: new ones are pushed before the next generation. On a GPU this is vLLM's sleep
        level 2, which keeps the buffers; its CPU worker has no sleep mode, so storages are emptied in place.
        """
        worker: Any = self
        if not current_platform.is_cpu():
            free, _ = torch.cuda.mem_get_info()
            worker.sleep(level=2)
            return torch.cuda.mem_get_info()[0] - free
        self.emptied = {
            "weights": _empty(worker.model_runner.model.parameters()),
            "kv_cache": _empty(worker.model_runner.kv_caches),
        }
        return sum(size for part in self.emptied.values() for _, size in part)

    def reacquire_memory(self, part: str) -> None:
        """
        Args:
            part: weights, whose values must then be loaded, or kv_cache.
        """
        worker: Any = self
        if not current_platform.is_cpu():
            worker.wake_up([part])
            return
        for storage, size in self.emptied.pop(part):
            storage.resize_(size)


def _empty(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Free the tensors' storages; returns each distinct storage with its former size in bytes."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    sizes = [(storage, storage.size()) for storage in storages.values()]
    for storage, _ in sizes:
        storage.resize_(0)
    return sizes


if BUCKETS not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BUCKETS, BucketTransfer)
