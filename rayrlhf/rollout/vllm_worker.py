"""What runs inside vLLM's worker: the receiving end of a weight sync.

vLLM imports this module in every worker process because `worker_extension_cls` names `WorkerExtension`; the
import registers the transfer backend. Only this module and `rollout.engine` may import vllm.
"""

from __future__ import annotations

from collections.abc import Iterator
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


if OBJECT_STORE not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(OBJECT_STORE, ObjectStoreTransfer)
