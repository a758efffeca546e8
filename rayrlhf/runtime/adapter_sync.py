"""Whether a policy run's engines take its LoRA adapters alone, or merged into all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rayrlhf.config.adapter_push import why_adapters_are_merged
from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.hub.local import local_folder
from rayrlhf.weights.lora_support import why_unsupported

KEY = "rollout.weight_sync.lora"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class AdapterSync(NamedTuple):
    alone: bool  # pushes are of the adapters alone
    reason: str  # of a merge: why it is one, or empty

    def line(self) -> str:
        if self.alone:
            return "LoRA adapters reach the engines alone; they add them to the base model"
        return f"LoRA adapters are merged into all weights of a push: {self.reason}"


def _fetched(path: str) -> str:
    return local_folder(path, weights=False)


def adapter_sync(config: PolicyRunConfig, folder_of: Callable[[str], str] = _fetched) -> AdapterSync:
    """`rollout.weight_sync.lora` with auto resolved. Reads the model's config.json, no weights.

    Raises:
        ConfigError: for `adapter`, if the engines cannot take these adapters.
    """
    wanted = config.rollout.weight_sync.lora
    if config.model.lora is None or wanted == "merged":
        return AdapterSync(False, f"{KEY}=merged" if config.model.lora else "")
    reason = why_adapters_are_merged(config) or _why_unsupported(config, folder_of)
    if reason is not None and wanted == "adapter":
        wanted_text = "adapters that vLLM can add to the base model"
        raise ConfigError(
            [Problem(KEY, f"adapter, but {reason}", wanted_text, f"set {KEY} to merged or auto")]
        )
    return AdapterSync(reason is None, reason or "")


def _why_unsupported(config: PolicyRunConfig, folder_of: Callable[[str], str]) -> str | None:
    trust = config.model.trust_remote_code
    found = AutoConfig.from_pretrained(folder_of(config.model.path), trust_remote_code=trust)
    text = found.get_text_config()
    if any((getattr(text, key, None) or 0) > 1 for key in EXPERT_COUNTS):
        return f"a {found.model_type} has experts, for which engines take merged weights"
    architectures = found.architectures or []
    if not architectures:
        return "config.json names no architecture"
    lora = config.model.lora
    assert lora is not None
    modules = lora.target_modules or sorted(set(_linear_layers(found, trust)))
    return why_unsupported(architectures[0], modules)


def _linear_layers(found: PreTrainedConfig, trust_remote_code: bool) -> Iterator[str]:
    """Last names of the layers that LoRA adapts if none are named: all linear ones but the output head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name.rpartition(".")[2]
