"""Log-probabilities of a frozen model served by vLLM: a large reference, tensor-parallel over GPUs."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rayrlhf.batch import PackedBatch
from rayrlhf.placement.replica_front import ActorSpec, proxy_deployment
from rayrlhf.placement.slots import Slots
from rayrlhf.rollout.engine import EngineSettings

# vLLM scores the prompts of generation requests: one token is generated and discarded.
SCORE = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}


class ScorerActor:
    """Actor with a vLLM engine that computes log-probabilities of given sequences."""

    def __init__(self, settings: EngineSettings) -> None:
        from rayrlhf.rollout.vllm_engine import (
            Stepper,  # vllm takes seconds to import: only here, where it runs
        )

        self.stepper = Stepper(settings.engine_args)

    async def ready(self) -> None:
        self.stepper.raise_if_dead()

    async def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Log-probability of each loss token given the tokens before it.

        Returns:
            [T] fp32; 0 at tokens outside the loss mask.

        Raises:
            ValueError: for a temperature other than 1.
        """
        if temperature != 1:
            raise ValueError(
                f"temperature {temperature:g}: vLLM computes prompt log-probabilities only at temperature 1"
            )
        ends = batch.cu_seqlens.tolist()
        sequences = [batch.input_ids[a:b].tolist() for a, b in pairwise(ends)]
        scored = await asyncio.gather(*map(self._score, sequences))
        return torch.where(batch.loss_mask > 0, torch.tensor([x for part in scored for x in part]), 0.0)

    async def _score(self, token_ids: list[int]) -> list[float]:
        [(_, output)] = [item async for item in self.stepper.stream(token_ids, [SCORE])]
        logprobs: Any = output.prompt_logprobs  # the first is None: no token precedes it
        return [0.0, *(at[token].logprob for at, token in zip(logprobs[1:], token_ids[1:], strict=True))]


def scorer_deployment(settings: EngineSettings, slots: Slots, *, role: str, num_replicas: int) -> Any:
    """The bound deployment; same interface as the reference of `train.frozen_server`."""
    spec = ActorSpec(
        role,
        ScorerActor,
        (settings,),
        env_vars=settings.env_vars,
        timeout_seconds=settings.rpc_timeout_seconds,
        start_timeout_seconds=settings.start_timeout_seconds,
    )
    return proxy_deployment(spec, num_replicas=num_replicas, slots=slots)
