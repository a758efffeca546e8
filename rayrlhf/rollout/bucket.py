"""Where one parameter lies in a bucket of raw bytes; known to trainer and engine, and imported by both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSlice:
    name: str  # as in the Hugging Face checkpoint
    dtype: str  # as in torch, e.g. "float32"
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int
