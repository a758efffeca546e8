"""`model`, `critic` and `ref`: the networks of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayrlhf.config.base import Count, NonNegativeNumber, PositiveNumber, Problem, Section

Dtype = Literal["auto", "float32", "bfloat16"]


class ModelConfig(Section):
    path: str = Field(min_length=1)
    """Folder of the actor's Hugging Face checkpoint, or a hub id (owner/name)."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    attention: Literal["auto", "flash_attention_2", "sdpa"] = "auto"
    """Attention kernel; auto is FlashAttention-2 on a GPU that has it, per-sequence SDPA elsewhere."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the checkpoint; only for checkpoints whose code you have read."""


class CriticConfig(Section):
    path: str | None = None
    """Checkpoint to start the critic from (language model or reward model); the actor's when left out."""
    lr: NonNegativeNumber = 1e-5
    """Learning rate of the critic; its schedule, warm-up and optimizer are those of `train`."""
    value_clip: PositiveNumber | None = 0.2
    """How far a value may move from the old one before its loss is clipped; null switches it off."""


def _replicas_are_used(ref: RefConfig) -> Problem | None:
    if ref.location == "serve" or ref.num_replicas == 1:
        return None
    return Problem(
        "num_replicas",
        got=f"{ref.num_replicas} with location=worker",
        wanted="no replicas: with location=worker every training worker holds a copy of its own",
        fix="set ref.location to serve, or remove num_replicas",
    )


class RefConfig(Section):
    path: str | None = None
    """Checkpoint of the reference policy; the actor's when left out."""
    location: Literal["worker", "serve"] = "worker"
    """A frozen copy in every training worker, or replicas behind Ray Serve on slots of their own."""
    num_replicas: Count = 1
    """Serve replicas of the reference (with location: serve)."""

    checks = (_replicas_are_used,)
