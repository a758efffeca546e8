"""A reference behind vLLM says what the packed forward pass says."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch

from rayrlhf.batch import PackedBatch, cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.rollout import RolloutConfig
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.rollout.logprob_server import ScorerActor
from rayrlhf.train.frozen_server import ReferenceActor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_vllm_scores_like_the_packed_forward_pass(tiny_model: str) -> None:
    lengths = [5, 70, 1, 33]  # longer than a block of the cache, and a single token
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(sum(lengths), generator=generator) < 0.7).float()
    mask[torch.tensor([0, 5, 75, 76])] = 0  # what begins a sequence
    batch = PackedBatch(
        input_ids=torch.randint(8, 264, (sum(lengths),), generator=generator),
        position_ids=position_ids_of(lengths),
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=mask,
    )
    settings = engine_settings(
        ModelConfig(path=tiny_model),
        RolloutConfig(kv_cache_bytes=64 * 2**20),
        seed=0,
        max_model_tokens=128,
        weight_store=None,
        on_gpu=False,
        threads=1,
    )
    scorer: Any = (
        ray.remote(ScorerActor)
        .options(num_cpus=0, runtime_env={"env_vars": settings.env_vars})
        .remote(settings)
    )
    wanted = ReferenceActor(ModelConfig(path=tiny_model), tiny_model, chunk_tokens=16).logprobs(batch, 1.0)
    try:
        for _ in range(2):  # the second time the prompts could be in the cache, where nothing is scored
            got: Any = ray.get(scorer.logprobs.remote(batch, 1.0), timeout=120)
            assert got.dtype == torch.float32 and bool((got[mask == 0] == 0).all())
            assert torch.allclose(got, wanted, atol=1e-4)
    finally:
        ray.kill(scorer)
