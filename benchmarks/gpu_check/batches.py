"""Models with random weights and packed batches of random tokens, as an update gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_check.shapes import llama
from rayrlhf.batch import PolicyBatch, cu_seqlens_of, position_ids_of
from rayrlhf.models.logprobs import PolicyModel


def make_policy(
    size: str, kernel: str, dtype: torch.dtype, device: torch.device, *, chunk: int
) -> PolicyModel:
    """With activation checkpointing. The same weights at every call."""
    torch.manual_seed(0)
    with device:  # billions of random numbers take a CPU a minute
        causal_lm: Any = AutoModelForCausalLM.from_config(
            llama(size), attn_implementation=kernel, dtype=dtype
        )
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyModel(causal_lm, chunk_tokens=chunk).train()


def make_batch(
    lengths: Sequence[int], vocabulary: int, device: torch.device, *, seed: int = 1
) -> PolicyBatch:
    """Responses whose every token but the first is a loss token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, positions = sum(lengths), position_ids_of(lengths)
    batch = PolicyBatch(
        input_ids=torch.randint(vocabulary, (tokens,), generator=generator),
        position_ids=positions,
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=(positions > 0).float(),
        scores=torch.zeros(len(lengths)),
        group_ids=torch.arange(len(lengths)),
        group_advantages=torch.zeros(len(lengths)),
        rollout_logprobs=torch.zeros(tokens),
        advantages=torch.randn(tokens, generator=generator),
    )
    return batch.to(device)
