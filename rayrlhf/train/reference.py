"""Reference policy backends: a frozen copy in the worker, the actor without adapters, or Serve replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rayrlhf.batch import PackedBatch
from rayrlhf.config.model import TrainedModelConfig
from rayrlhf.config.train import OptimizerConfig
from rayrlhf.models.adapters import adapters_off
from rayrlhf.models.load import load_policy, resolve_dtype
from rayrlhf.train import collectives
from rayrlhf.train.deepspeed_engine import loading, make_engine
from rayrlhf.train.frozen_server import ask_all, logprobs_of
from rayrlhf.train.learner import Learner
from rayrlhf.train.sequence_parallel import own_outputs, set_sequence_group
from rayrlhf.train.weight_offload import WeightOffload


class Reference(Protocol):
    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Per-token log-probabilities [T] of each micro-batch."""
        ...


class LocalReference:
    """A frozen copy in the actor's workers; partitioned over the ranks when the actor is (ZeRO-3)."""

    def __init__(self, model: TrainedModelConfig, path: str, train: OptimizerConfig) -> None:
        device = collectives.device()
        dtype = resolve_dtype(model.dtype, device)
        with loading(train, dtype):
            policy = load_policy(model, path, device=device, chunk_tokens=train.logprob_chunk_tokens).eval()
        policy.requires_grad_(False)
        set_sequence_group(policy, model, train)
        self.module = policy
        self.weight_offload = WeightOffload(policy, pinned=device.type == "cuda")
        if train.zero_stage == 3:
            self.policy: Any = make_engine(policy, train, lr=None, dtype=dtype)
        else:
            self.policy = policy.to(device)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        return own_outputs(self.module, batches, lambda batch: logprobs_of(self.policy, batch, temperature))

    def offload_weights(self) -> None:
        """Keep the weights in host memory until `reload`. Not on a CPU, and not under ZeRO-3."""
        if collectives.device().type == "cuda":
            self.weight_offload.to_host()

    def reload(self) -> None:
        self.weight_offload.to_device()


class AdaptersOff:
    """The actor with its LoRA adapters disabled, which is the initial policy: no second copy."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        with adapters_off(self.learner.module):
            return self.learner.infer(batches, lambda policy, batch: logprobs_of(policy, batch, temperature))


class ServedReference:
    """Client of a reference deployment, from `train.frozen_server` or `rollout.logprob_server`."""

    def __init__(self, handle: Any, *, timeout_seconds: float) -> None:
        self.handle = handle
        self.timeout_seconds = timeout_seconds

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        logprobs = ask_all(
            self.handle, "logprobs", batches, temperature, timeout_seconds=self.timeout_seconds
        )
        return [answer.to(batch.input_ids.device) for answer, batch in zip(logprobs, batches, strict=True)]
