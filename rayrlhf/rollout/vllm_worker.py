"""What runs inside vLLM's worker: the receiving end of a weight sync.

vLLM imports this module in every worker process because `worker_extension_cls` names `WorkerExtension`; the
import registers the transfer backend. Only this module, `vllm_reload` and
`rollout.vllm_engine` may import vllm.
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
from rayrlhf.weights.transfer_group import Link, Meeting, join

BUCKETS = "rayrlhf_buckets"

if current_platform.is_cpu():
    # oneDNN keeps packed copies of the weights which a reload does not reach; a tied lm_head would go on
    # answering with the old ones. Without packing, the layers are plain F.linear over the parameters that we
    # write to.
    _custom_ops._supports_onednn = False
    pack_experts_at_every_load()


@dataclass
class BucketInit(WeightTransferInitInfo):
    meeting: Meeting
    first_rank: int  # there, of this engine's first worker


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    slices: Sequence[TensorSlice]
    bucket: Any = None  # uint8 array, read-only, shared with the object store; None: comes over the link


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):
    """Loads buckets of tensors as a checkpoint has them, and insists that every parameter was reached."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate
    link: Link | None = None
    reload: Reload

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self.link = None
        rank = init_info.first_rank + self.parallel_config.rank
        self.link = join(init_info.meeting, rank=rank, device=self.device, key=device_key(self.device))

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
    """Named in `worker_extension_cls`; vLLM mixes it into its worker class."""

    def device_key(self) -> str:
        worker: Any = self
        return device_key(worker.device)

    def leave_meeting(self) -> None:
        """Close the connections: whoever waits in a collective learns that this engine has gone."""
        worker: Any = self
        worker.weight_transfer_engine.shutdown()

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


if BUCKETS not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BUCKETS, BucketTransfer)
