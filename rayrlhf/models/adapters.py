"""Reads, merges or disables the LoRA adapters of a model.

An adapted layer (PEFT's) computes W x + scaling · B A x. `models.lora` creates them, with PEFT, which this
module does not import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayrlhf.config.model import LoraConfig
from rayrlhf.models.vision import is_vision_language

ADAPTER = "default"  # PEFT's name of the only adapter
EXPERT_ADAPTERS = "adapters"  # a module of experts holds their adapters under this name
BASE = ".base_layer."  # between the name of an adapted layer and that of its weight


class Weight(NamedTuple):
    """A parameter or buffer with its name in the model, and its layer's adapter."""

    name: str
    parameter: Tensor
    layer: Any = None  # PEFT's layer, if adapted

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor, which differs from a ZeRO-3 partition and from the 4-bit form."""
        quantized = getattr(self.parameter, "quant_state", None)
        return tuple(
            quantized.shape if quantized else getattr(self.parameter, "ds_shape", self.parameter.shape)
        )

    @property
    def dtype(self) -> torch.dtype:
        quantized = getattr(self.parameter, "quant_state", None)
        return quantized.dtype if quantized else self.parameter.dtype

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that `merged` reads; under ZeRO-3 they must be gathered first."""
        return [self.parameter, *adapter_parameters(self.layer)]

    def merged(self) -> Tensor:
        """W + scaling · B A in the dtype and on the device of W, without gradient; computed in fp32 and
        rounded once.

        In bf16 most of a small update is lost in that rounding, and just as much of it is lost where the
        trainer adds the adapter's output to the layer's: both are equally far from the unrounded weights.
        """
        weight = self._dense()
        if self.layer is None:
            return weight
        with torch.no_grad():
            return (weight.float() + _update(self.layer)).to(weight.dtype)

    def _dense(self) -> Tensor:
        if not hasattr(self.parameter, "quant_state"):
            return self.parameter.detach()
        from rayrlhf.models.quantize import dense  # imports bitsandbytes

        return dense(self.parameter)


def _update(layer: Any) -> Tensor:
    """scaling · B A in fp32, in the layout of the layer's weight."""
    a, b = (matrix.float() for matrix in adapter_parameters(layer))
    update = layer.scaling[ADAPTER] * (b @ a)
    return update.mT if getattr(layer, "fan_in_fan_out", False) else update


def weights_of(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[Weight]:
    """The model's parameters with their checkpoint names; adapters belong to the weights they adapt."""
    layers = adapted_layers(model)
    own = {id(parameter) for layer in layers.values() for parameter in adapter_parameters(layer)}
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        if id(parameter) in own:
            continue
        owner, base, last = name.rpartition(BASE)
        if base and owner in layers:
            yield Weight(f"{owner}.{last}", parameter, layers[owner] if last == "weight" else None)
        else:
            experts, _, stack = name.rpartition(".")
            yield Weight(name, parameter, layers.get(f"{experts}.{EXPERT_ADAPTERS}.{stack}"))


class TrainedAdapter(NamedTuple):
    """Trained adapters to be saved; `state` has the names of `adapter_weights`."""

    lora: LoraConfig
    base: str  # folder or hub id of the base model
    state: dict[str, Tensor]
    not_adapted: str | None = None  # regular expression of modules that `lora` leaves out


def not_adapted(model: Any) -> str | None:
    """The vision tower of a vision-language model: names such as gate_proj, or all linear layers, match its
    layers, too.
    """
    config = getattr(model, "config", None)
    return r"(.*\.)?visual\..*" if config is not None and is_vision_language(config) else None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model computes the outputs of its base.

    Sets the scaling to 0 instead of skipping the adapters: ZeRO-3 then sees the same modules in the same
    order as in training, and need not trace a second one.
    """
    layers = adapted_layers(model).values()
    kept = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling[ADAPTER] = scaling


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers, and `expert_adapters.ExpertAdapter`, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter parameters, with their names in PEFT's files without the prefix."""
    for name, layer in adapted_layers(model).items():
        for matrix in ("lora_A", "lora_B"):
            yield f"{name}.{matrix}.weight", getattr(layer, matrix)[ADAPTER].weight


class AdapterMatrix(NamedTuple):
    """A matrix of an adapter for the engines, with its name in `adapter_weights`: A, or scaling · B."""

    name: str
    parameter: nn.Parameter
    scaling: float  # 1 for A

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """A copy of the full matrix (under ZeRO-3 it must be gathered first), multiplied in fp32 and rounded
        once.
        """
        return (self.parameter.detach().float() * self.scaling).to(dtype)


def adapter_matrices(model: nn.Module) -> Iterator[AdapterMatrix]:
    """All matrices of the model's adapters, in the order of its layers."""
    for name, layer in adapted_layers(model).items():
        yield AdapterMatrix(f"{name}.lora_A.weight", layer.lora_A[ADAPTER].weight, 1.0)
        yield AdapterMatrix(f"{name}.lora_B.weight", layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """A [r, in] and B [out, r], of experts stacked; empty for a layer without adapter."""
    return [] if layer is None else [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
