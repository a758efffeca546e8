"""Deterministic training mode: compared log-probabilities, scores and values must not depend on dropout.

Dropout, layerdrop, router jitter and Phi-MoE's sampled experts all depend on `module.training`, under many
names, some read from the config in each forward pass. Therefore the layers stay in evaluation mode while they
are trained, whatever the architecture. Adapters have a separate dropout (`model.lora.dropout`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

LORA_DROPOUT = "lora_dropout"  # name of PEFT's dropout module


class TrainedModule(nn.Module):
    """A decoder and a head. In training mode it is deterministic unless `drops` is set."""

    # Whether the dropout of the model's config.json is active in training. See `keep_dropout`.
    drops: bool = False

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and not self.drops:
            _settle(self)
        return self


def keep_dropout(module: TrainedModule) -> None:
    """Train with the model's own dropout, but without layerdrop: ranks that drop different layers would
    deadlock under ZeRO-3 and sequence parallelism.
    """
    module.drops = True
    for layer in module.modules():
        if hasattr(layer, "layerdrop"):
            setattr(layer, "layerdrop", 0.0)  # noqa: B010  # the layer's type is unknown
    module.train(module.training)


def _settle(module: nn.Module) -> None:
    """Put the submodules of `module` into evaluation mode, except the dropout of adapters."""
    inside = [
        (name, child)
        for name, child in module.named_modules()
        if child is not module and LORA_DROPOUT not in name.split(".")
    ]
    for _, child in inside:
        child.training = False
    recomputed: list[Any] = [child for _, child in inside if getattr(child, "gradient_checkpointing", False)]
    layers: list[Any] = [child for child in recomputed if isinstance(child, GradientCheckpointingLayer)]
    for layer in layers:
        # transformers recomputes activations only in layers that are in training mode.
        layer.training = True
        layer._gradient_checkpointing_func = partial(_recomputed, layer)
    for decoder in recomputed if not layers else ():  # models with custom code check it in the decoder
        decoder.training = True
        own = [name for name, value in vars(decoder).items() if type(value) is float and "drop" in name]
        for name in own:
            setattr(decoder, name, 0.0)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *inputs: Tensor) -> Any:
    """The layer's outputs, in evaluation mode; its activations are recomputed in the backward pass."""

    def settled(*inputs: Tensor) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    offload = getattr(layer, "activation_offload", None)  # rayrlhf.models.activation_offload
    with offload.hooks() if offload is not None else nullcontext():
        return checkpoint(settled, *inputs, use_reentrant=False)
