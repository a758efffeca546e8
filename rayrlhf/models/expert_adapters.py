"""Low-rank adapters of stacked expert weights: each expert has its own A and B (arXiv 2106.09685).

PEFT adds B A to the whole stack in every forward pass, which makes a copy of all experts, and needs weights
that ZeRO-3 does not partition. Here the tokens of an expert pass through its A and B, as in a linear layer.
`models.lora` saves them in PEFT's format.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import ADAPTER, EXPERT_ADAPTERS
from rayrlhf.models.experts import moe_layers


class StackedLinear(nn.Module):
    """A linear layer per expert, without bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)  # [E, out, in]

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """[N, out] of `rows` [N, in], sorted by expert; `offsets` [E]: where each expert's rows end."""
        return _grouped_linear(rows, self.weight, offsets)


class ExpertAdapter(nn.Module):
    """scaling · B A of one stack of expert weights, with the attributes of a layer of PEFT."""

    def __init__(self, stack: Tensor, lora: LoraConfig, *, is_transposed: bool) -> None:
        """`stack`: the weights [E, out, in]; [E, in, out] with `is_transposed`."""
        super().__init__()
        num_experts, rows, columns = getattr(stack, "ds_shape", stack.shape)
        num_out, num_in = (columns, rows) if is_transposed else (rows, columns)
        new = {"dtype": stack.dtype, "device": stack.device}
        a = torch.empty(num_experts, lora.rank, num_in, **new)
        for matrix in a:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # as in PEFT
        b = torch.zeros(num_experts, num_out, lora.rank, **new)
        self.lora_A = nn.ModuleDict({ADAPTER: StackedLinear(a)})
        self.lora_B = nn.ModuleDict({ADAPTER: StackedLinear(b)})
        self.lora_dropout = nn.ModuleDict({ADAPTER: nn.Dropout(lora.dropout)})
        self.scaling = {ADAPTER: lora.alpha / lora.rank}
        self.fan_in_fan_out = is_transposed  # of the stack

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        low = self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](rows), offsets)
        return self.scaling[ADAPTER] * self.lora_B[ADAPTER](low, offsets)


def check_experts(model: nn.Module) -> None:
    """Raises `ValueError` if the model has no experts that could be adapted."""
    layers = moe_layers(model)
    why = "" if layers else "this model has no mixture-of-experts layers"
    for layer in layers:
        if not all(hasattr(layer.experts, name) for name in ("is_transposed", "has_gate", "down_proj")):
            why = (
                f"{type(layer.experts).__name__} does not hold its experts' weights in stacks that are known"
            )
    if why:
        raise ValueError(
            f"got true, wanted false: {why}. Fix: remove the key; attention is adapted without it"
        )


def add_expert_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Adapt the experts of every layer; the model's outputs are unchanged, as B is 0.

    Raises `ValueError` like `check_experts`.
    """
    check_experts(model)
    for layer in moe_layers(model):
        experts: Any = layer.experts
        adapters = {
            name: ExpertAdapter(getattr(experts, name), lora, is_transposed=experts.is_transposed)
            for name in stacks_of(experts)
        }
        setattr(experts, EXPERT_ADAPTERS, nn.ModuleDict(adapters))
        experts.forward = MethodType(_adapted_forward, experts)


def stacks_of(experts: Any) -> tuple[str, str]:
    """Names of the stacked weights, in order of use."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def _adapted_forward(
    experts: Any,
    hidden: Tensor,  # [N, H]
    chosen: Tensor,  # [N, K]
    weights: Tensor,  # [N, K]
) -> Tensor:
    """Σ weight · expert(hidden) over each token's experts, [N, H]."""
    count = chosen.size(-1)
    numbers, order = chosen.flatten().sort(stable=True)
    counts = numbers.new_zeros(experts.num_experts).scatter_add(0, numbers, torch.ones_like(numbers))
    ends = counts.cumsum(0).to(torch.int32)
    rows = hidden[order // count]  # [N·K, H], sorted by expert
    for name in stacks_of(experts):
        bias = getattr(experts, f"{name}_bias")[numbers] if experts.has_bias else None
        base = _grouped_linear(
            rows, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed
        )
        adapted = base + getattr(experts, EXPERT_ADAPTERS)[name](rows, ends)
        if name == "down_proj":
            rows = adapted
        else:
            rows = experts._apply_gate(adapted) if experts.has_gate else experts.act_fn(adapted)
    weighted = rows * weights.flatten()[order, None]
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)
