"""What runs inside vLLM's worker: the receiving end of a weight sync.

vLLM imports this module in every worker process because `worker_extension_cls` names `WorkerExtension`; the
import registers the transfer backend. Only this module and `rollout.engine` may import vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

from rayrlhf.rollout.bucket import TensorSlice

OBJECT_STORE = "rayrlhf_object_store"

if current_platform.is_cpu():
    # oneDNN keeps packed copies of the weights which a reload does not reach; a tied lm_head would go on
    # answering with the old ones. Without packing, the layers are plain F.linear over the parameters that we
    # write to.
    _custom_ops._supports_onednn = False


@dataclass
class BucketInit(WeightTransferInitInfo):
    """Nothing to set up: buckets arrive with the call."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    slices: list[TensorSlice]
    bucket: Any  # one-dimensional uint8 array, read-only, shared with the object store


class ObjectStoreTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):
    """Loads buckets of checkpoint-named tensors in place and insists that every parameter was reached."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self.reached: set[str] = set()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        model: Any = self.model
        self.reached |= model.load_weights(unpack(update_info.slices, update_info.bucket))

    def finish_weight_update(self) -> None:
        missing = sorted({name for name, _ in self.model.named_parameters()} - self.reached)
        if missing:
            raise RuntimeError(
                f"weight sync left {len(missing)} engine parameters at their old values, among them "
                f"{missing[:5]}: the trainer's model and the engine's model differ"
            )

    def shutdown(self) -> None:
        pass


def unpack(slices: list[TensorSlice], bucket: Any) -> Iterator[tuple[str, Tensor]]:
    flat = torch.from_numpy(bucket)  # never written to: load_weights copies out of it
    for piece in slices:
        raw = flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes]
        yield piece.name, raw.view(getattr(torch, piece.dtype)).view(piece.shape)


class WorkerExtension:
    """Named in `worker_extension_cls`; vLLM mixes it into its worker class."""

    def give_up_memory(self) -> int:
        """Let go of weights and key-value cache; returns the bytes that were freed.

        Weights are not kept: the next ones are pushed before anybody generates. On a GPU this is vLLM's sleep
        of level 2, which keeps the buffers; its CPU worker has none, so storages are emptied in place.
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

    def take_memory(self, part: str) -> None:
        """`part`: weights, whose values are then to be loaded, or kv_cache."""
        worker: Any = self
        if not current_platform.is_cpu():
            worker.wake_up([part])
            return
        for storage, size in self.emptied.pop(part):
            storage.resize_(size)


def _empty(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Give the tensors' storages back, and return them with their sizes in bytes; shared ones once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    sizes = [(storage, storage.size()) for storage in storages.values()]
    for storage, _ in sizes:
        storage.resize_(0)
    return sizes


if OBJECT_STORE not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(OBJECT_STORE, ObjectStoreTransfer)
