"""Checks which tensor-parallel sizes a model's attention heads allow. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rayrlhf.capacity.model_shape import ModelShape
from rayrlhf.config.base import Problem

WIDEST = 64


def splits_evenly(shape: ModelShape, width: int) -> bool:
    """Whether every GPU gets the same number of heads, and its own key-value heads."""
    return shape.heads % width == 0 and shape.kv_heads % width == 0


def can_split(shape: ModelShape, width: int) -> bool:
    """Whether vLLM accepts it: with more GPUs than key-value heads, these are replicated."""
    shared = shape.kv_heads % width == 0 or width % shape.kv_heads == 0
    return shape.heads % width == 0 and shared


def split_problems(config: Any, shape_of: Callable[[str], ModelShape]) -> Iterator[Problem]:
    """Problems with the tensor-parallel sizes of a job's engines and of a reference served by vLLM."""
    rollout, ref = getattr(config, "rollout", None), getattr(config, "ref", None)
    engines: list[tuple[str, int, str]] = []
    if rollout is not None and getattr(config.data, "response_key", None) is None:
        engines.append(("rollout.tensor_parallel", rollout.tensor_parallel, config.model.path))
    if ref is not None and getattr(ref, "engine", None) == "vllm":
        engines.append(("ref.tensor_parallel", ref.tensor_parallel, ref.path or config.model.path))
    for key, width, path in engines:
        if width == 1:
            continue
        shape = shape_of(path)
        if not can_split(shape, width):
            fitting = [str(n) for n in range(1, WIDEST + 1) if can_split(shape, n)]
            yield Problem(
                key,
                got=f"{width} for {shape.heads} attention heads and {shape.kv_heads} key-value heads",
                wanted="a divisor of the heads that divides the key-value heads, or is a multiple of them",
                fix=f"set {key} to one of {', '.join(fitting)}",
            )
