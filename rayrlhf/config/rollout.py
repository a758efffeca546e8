"""`rollout`: engines, sampling and weight sync."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayrlhf.config.base import Problem, Section
from rayrlhf.config.model import Dtype


def _minimum_fits(sampling: SamplingConfig) -> Problem | None:
    if sampling.min_new_tokens <= sampling.max_new_tokens:
        return None
    return Problem(
        "min_new_tokens",
        got=f"{sampling.min_new_tokens} with max_new_tokens={sampling.max_new_tokens}",
        wanted=f"at most max_new_tokens, {sampling.max_new_tokens}",
        fix="lower min_new_tokens or raise max_new_tokens",
    )


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy (evaluation only)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(-1, ge=-1)
    """Keep the k likeliest tokens; -1 keeps all."""
    min_new_tokens: int = Field(0, ge=0)
    """No stop token before this many tokens."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response, in tokens."""
    stop: list[str] = []
    """Strings that end a response, beside the model's own end of text."""

    checks = (_minimum_fits,)


class WeightSyncConfig(Section):
    backend: Literal["auto", "object_store"] = "auto"
    """How weights travel to the engines."""
    bucket_bytes: int = Field(134_217_728, ge=1)
    """Size of one transfer, in bytes."""
    timeout_seconds: float = Field(300, gt=0)
    """Deadline for all engines to hold the new weights."""


class RolloutConfig(Section):
    num_engines: int = Field(1, ge=1)
    """vLLM engines, each a Serve replica."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs per engine."""
    group_size: int = Field(1, ge=1)
    """Samples per prompt."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts per step, over all workers."""
    sampling: SamplingConfig = SamplingConfig()
    """How training samples are drawn."""
    kv_cache_bytes: int = Field(1_073_741_824, ge=1)
    """Key-value cache of a CPU engine, in bytes."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of its GPU's memory that an engine takes."""
    max_concurrent_requests: int = Field(256, ge=1)
    """Requests an engine works on at once."""
    num_threads: int | None = Field(None, ge=1)
    """Threads of a CPU engine; the node's cores divided by its engines when left out."""
    dtype: Dtype = "auto"
    """Dtype of the engines' weights; auto is the model's."""
    timeout_seconds: float = Field(600, gt=0)
    """Deadline of one generation request, retries included."""
    start_timeout_seconds: float = Field(600, gt=0)
    """Deadline for all engines to come up."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """How new weights reach the engines."""
