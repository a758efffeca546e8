"""Low-rank adapters (LoRA, arXiv 2106.09685): adds them to a frozen model, saves them in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayrlhf.config.model import LoraConfig
from rayrlhf.hub.ids import pinned_id
from rayrlhf.models.adapter_format import ADAPTER_PREFIX, ADAPTER_WEIGHTS
from rayrlhf.models.adapters import EXPERT_ADAPTERS, TrainedAdapter, not_adapted
from rayrlhf.models.expert_adapters import add_expert_adapters
from rayrlhf.models.experts import moe_layers
from rayrlhf.models.lora_linear import fuse_adapted_layers
from rayrlhf.models.quiet_peft import LoraConfig as PeftConfig
from rayrlhf.models.quiet_peft import inject_adapter_in_model


def add_adapters(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Freeze `model` and add adapters to its linear layers, the same on every rank; the model's outputs are
    unchanged, as B is 0.

    Raises `ValueError` like `check_targets`.
    """
    check_targets(model, lora)
    if lora.target_modules is None and moe_layers(model):
        lora = lora.model_copy(update={"target_modules": sorted(linear_layers(model))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(lora, exclude_modules=not_adapted(model)), model)
        fuse_adapted_layers(model)
        if lora.experts:
            add_expert_adapters(model, lora)


def check_targets(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raises `ValueError` for target modules that are not linear layers of the model, or are its output head,
    whose weight is read directly.
    """
    wanted, found = lora.target_modules or [], linear_layers(model)
    if taken := sorted(OF_EXPERTS.intersection(wanted)) if moe_layers(model) else []:
        raise ValueError(
            f"got {', '.join(taken)}, wanted some of the linear layers, {', '.join(sorted(found))}: PEFT "
            "takes these names for the experts. Fix: leave them out; model.lora.experts adapts the experts"
        )
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(
            f"got {', '.join(unknown)}, wanted some of the linear layers, {', '.join(sorted(found))}. "
            "Fix: use the last parts of their names, or omit the key to adapt all"
        )


# In models with experts, PEFT applies adapters of these names to the experts and their router (as they were
# named before transformers stacked them), and no longer to linear layers, such as shared experts.
OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Last names of the linear layers that may be adapted."""
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return found - OF_EXPERTS if moe_layers(model) else found


def write_adapter(folder: Path, adapter: TrainedAdapter, *, task: str, head: str | None = None) -> None:
    """Write `adapter_config.json` and the weights. `task` is PEFT's task type, and `head` a fully trained
    module, whose weights are in the state too.
    """
    pinned = pinned_id(adapter.base)
    stacks = sorted({stack for name in adapter.state if (stack := _stack_of(name)) is not None})
    layers = {_layer_of(name) for name in adapter.state if ".lora_" in name and _stack_of(name) is None}
    lora = adapter.lora.model_copy(update={"target_modules": sorted(layers)})
    if stacks:
        lora = lora.model_copy(update={"dropout": 0.0})  # PEFT has none for stacked weights
    config = _peft_config(
        lora,
        target_parameters=[f"experts.{stack}" for stack in stacks] or None,
        base_model_name_or_path=pinned.repo if pinned else adapter.base,
        revision=pinned.revision if pinned else None,
        task_type=task,
        exclude_modules=adapter.not_adapted,
        modules_to_save=[head] if head else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = dict(_in_peft_format(name, tensor) for name, tensor in adapter.state.items())
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _stack_of(name: str) -> str | None:
    """The stacked expert weight that an adapter's tensor belongs to; None for a linear layer."""
    owner, found, rest = name.rpartition(f".{EXPERT_ADAPTERS}.")
    return rest.partition(".")[0] if found and owner.endswith("experts") else None


def _layer_of(name: str) -> str:
    """Last name of the layer that an adapter's tensor belongs to: q_proj of `….q_proj.lora_A.weight`."""
    return name.rpartition(".lora_")[0].rpartition(".")[2]


def _in_peft_format(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """PEFT's name and layout of an adapter's tensor.

    For stacked weights it nests a module per stack, down_proj outside, and has A as [E·r, in] and B as
    [out, r·E].
    """
    stack = _stack_of(name)
    if stack is not None:
        if name.endswith("lora_A.weight"):
            tensor = tensor.flatten(0, 1)
        else:
            tensor = tensor.permute(1, 2, 0).flatten(1)
        inner = "" if stack == "down_proj" else "base_layer."
        name = name.replace(f".{EXPERT_ADAPTERS}.{stack}.", f".{inner}")
    return f"{ADAPTER_PREFIX}{name}", tensor.contiguous()


def _peft_config(lora: LoraConfig, **more: Any) -> PeftConfig:
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # divided by r
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        **more,
    )
