"""Liger's Triton kernels for norms, rotations and gated MLPs (`model.kernels: liger`), on CUDA.

Each computes in one kernel what torch computes in several, and keeps less for the backward pass: a norm its
input and one number per token, a gated MLP no activation. Liger's own functions apply them to a model; its
losses are left out, as the output head is fused here (rayrlhf.models.fused_head), and its experts, as experts
may have adapters.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rayrlhf.models.experts import moe_layers
from rayrlhf.models.vision import is_vision_language

DEVICES = ("cuda",)
NORMS_AND_ROTATIONS = ("rms_norm", "rope")
MLPS = ("swiglu", "geglu")


def check_liger(config: Any, device: torch.device) -> None:
    """Raises `ValueError` if a model of this (transformers') config cannot have Liger's kernels."""
    fix = "remove model.kernels, or set it to none"
    if device.type not in DEVICES:
        raise ValueError(f"model.kernels=liger needs CUDA GPUs, for which its kernels are made; {fix}")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(f"model.kernels=liger needs the package liger-kernel: pip install it, or {fix}")
    if is_vision_language(config):
        raise ValueError(f"model.kernels=liger has not been tried with images ({config.model_type}); {fix}")
    known = _appliers()
    if config.get_text_config().model_type not in known:
        raise ValueError(
            f"model.kernels=liger: Liger has no kernels for {config.model_type}, but for "
            f"{', '.join(sorted(known))}; {fix}"
        )


def apply_liger(model: Any) -> None:
    """Let the norms, rotations and gated MLPs of a language model or decoder be Liger's."""
    apply = _appliers()[model.config.get_text_config().model_type]
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    wanted = (*NORMS_AND_ROTATIONS, *(() if moe_layers(model) else MLPS))
    flags = {name: name in wanted for name in inspect.signature(apply).parameters if name != "model"}
    apply(**flags, model=model)
    # It replaces classes and functions of the module for all models, also for those that are still to be
    # made, and for small copies on the CPU (rayrlhf.models.probe).
    for name, found in list(vars(modeling).items()):
        own = before.get(name)
        if own is None or found is own:
            continue
        setattr(modeling, name, own if isinstance(own, type) else _on_gpus(found, own))


def _on_gpus(kernel: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """A rotation by the kernel where its tensors are on a GPU, else transformers' own."""

    def rotated(query: Tensor, *inputs: Any, **named: Any) -> Any:
        return (kernel if query.device.type in DEVICES else own)(query, *inputs, **named)

    return rotated


def _appliers() -> dict[str, Callable[..., None]]:
    """Liger's functions that apply its kernels, by model type."""
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    return MODEL_TYPE_TO_APPLY_LIGER_FN
