"""Frozen linear layers in 4 bits: NF4 in blocks of 64 with double quantisation (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel


class Nf4Linear(Linear4bit):
    """bitsandbytes' layer, made from a dense one. A state dict has the packed weight without the constants
    that unpack it: nobody loads it, for the model's folder has the dense one.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        with torch.device("meta"):  # a random weight that nobody needs
            super().__init__(
                linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
        parameter: Any = Params4bit  # whose type is that of any parameter
        weight = parameter(linear.weight.data, requires_grad=False, quant_type="nf4", module=self)
        self.weight = weight.to(device)  # which quantises
        self.bias = linear.bias
        # In evaluation mode some CPUs would lay weights out anew, and gradients behind them become 0.
        self.support_avx512bf16_for_cpu = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)


def quantize(model: PreTrainedModel, device: torch.device) -> None:
    """Replace all linear layers but the output head, one by one; `device` keeps the 4-bit weights. Raises
    `ValueError` as `layers_to_quantize` does.
    """
    for name, linear in layers_to_quantize(model).items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, Nf4Linear(linear, device))


def layers_to_quantize(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """By name. Raises `ValueError` for a model that has none (GPT-2's layers are convolutions)."""
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        raise ValueError(
            f"got nf4 for {type(model).__name__}, wanted a model with linear layers. Fix: remove the key"
        )
    return layers


def dense(parameter: Tensor) -> Tensor:
    """The weight that a 4-bit parameter stands for, in the dtype that it had."""
    state: Any = parameter.quant_state  # pyright: ignore[reportAttributeAccessIssue]  # Params4bit's
    return dequantize_4bit(parameter.data, state)
