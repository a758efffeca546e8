"""Frozen linear layers in 4 bits: NF4 in blocks of 64 with double quantisation (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel


class Nf4Linear(Linear4bit):
    """bitsandbytes' layer, created from a dense one. Its state dict has the packed weight without the
    constants to unpack it: it is never loaded, since the model's folder has the dense weight.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        with torch.device("meta"):  # the random weight is not needed
            super().__init__(
                linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
        parameter: Any = Params4bit  # its type annotation is that of a plain parameter
        weight = parameter(linear.weight.data, requires_grad=False, quant_type="nf4", module=self)
        self.weight = weight.to(device)  # which quantises
        self.bias = linear.bias
        # In evaluation mode the weights would be re-laid out on some CPUs, and gradients behind them be 0.
        self.support_avx512bf16_for_cpu = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)


def quantize(model: PreTrainedModel, device: torch.device) -> None:
    """Replace all linear layers except the output head, one by one; the 4-bit weights are on `device`. Raises
    `ValueError` like `layers_to_quantize`.
    """
    for name, linear in layers_to_quantize(model).items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, Nf4Linear(linear, device))


def layers_to_quantize(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers by name. Raises `ValueError` for a model without any (GPT-2 has Conv1D layers)."""
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
    """The dequantized weight of a 4-bit parameter, in its original dtype."""
    state: Any = parameter.quant_state  # pyright: ignore[reportAttributeAccessIssue]  # Params4bit's
    return dequantize_4bit(parameter.data, state)
