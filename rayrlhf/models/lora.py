"""Low-rank adapters (LoRA, arXiv 2106.09685): adds them to a frozen model, saves them in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayrlhf.config.model import LoraConfig
from rayrlhf.hub.ids import pinned_id
from rayrlhf.models.adapter_format import ADAPTER_PREFIX, ADAPTER_WEIGHTS
from rayrlhf.models.adapters import TrainedAdapter, not_adapted
from rayrlhf.models.quiet_peft import LoraConfig as PeftConfig
from rayrlhf.models.quiet_peft import inject_adapter_in_model


def add_adapters(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Freeze `model` and add adapters to its linear layers, the same on every rank; the model's outputs are
    unchanged, as B is 0.

    Raises `ValueError` like `check_targets`.
    """
    check_targets(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(lora, exclude_modules=not_adapted(model)), model)


def check_targets(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raises `ValueError` for target modules that are not linear layers of the model, or are its output head,
    whose weight is read directly.
    """
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    wanted = lora.target_modules or []
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(
            f"got {', '.join(unknown)}, wanted some of the linear layers, {', '.join(sorted(found))}. "
            "Fix: use the last parts of their names, or omit the key to adapt all"
        )


def write_adapter(folder: Path, adapter: TrainedAdapter, *, task: str, head: str | None = None) -> None:
    """Write `adapter_config.json` and the weights. `task` is PEFT's task type, and `head` a fully trained
    module, whose weights are in the state too.
    """
    pinned = pinned_id(adapter.base)
    config = _peft_config(
        adapter.lora,
        base_model_name_or_path=pinned.repo if pinned else adapter.base,
        revision=pinned.revision if pinned else None,
        task_type=task,
        exclude_modules=adapter.not_adapted,
        modules_to_save=[head] if head else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {f"{ADAPTER_PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _peft_config(lora: LoraConfig, **more: Any) -> PeftConfig:
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # divided by r
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        **more,
    )
