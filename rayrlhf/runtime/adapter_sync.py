"""Whether a policy run's engines take its LoRA adapters alone, or merged into all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rayrlhf.config.adapter_push import why_adapters_are_merged
from rayrlhf.config.base import ConfigError, Problem
from rayrlhf.config.model import LoraConfig
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.hub.local import local_folder
from rayrlhf.models.vision import is_vision_language
from rayrlhf.weights.lora_support import why_unsupported

KEY = "rollout.weight_sync.lora"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class AdapterSync(NamedTuple):
    adapter: LoraConfig | None  # that pushes send alone, its target modules named; None: merged, or no LoRA
    reason: str = ""  # why adapters are merged

    def line(self) -> str:
        if self.adapter is not None:
            return "LoRA adapters reach the engines alone; they add them to the base model"
        return f"LoRA adapters are merged into all weights of a push: {self.reason}"


def _fetched(path: str) -> str:
    return local_folder(path, weights=False)


def adapter_sync(config: PolicyRunConfig, folder_of: Callable[[str], str] = _fetched) -> AdapterSync:
    """`rollout.weight_sync.lora` with auto resolved. Reads the model's config.json, no weights.

    Raises:
        ConfigError: for `adapter`, if the engines cannot take these adapters.
    """
    wanted, lora = config.rollout.weight_sync.lora, config.model.lora
    if lora is None:
        return AdapterSync(None)
    if wanted == "merged":
        return AdapterSync(None, f"{KEY}=merged")
    reason = why_adapters_are_merged(config)
    if reason is None:
        trust = config.model.trust_remote_code
        found = AutoConfig.from_pretrained(folder_of(config.model.path), trust_remote_code=trust)
        if is_vision_language(found):
            reason = f"a {found.model_type} reads images, for which engines take merged weights"
        else:
            modules = lora.target_modules or sorted(set(_linear_layers(found, trust)))
            reason = _why_unsupported(found, modules)
            if reason is None:
                return AdapterSync(lora.model_copy(update={"target_modules": modules}))
    if wanted == "adapter":
        wanted_text = "adapters that vLLM can add to the base model"
        raise ConfigError(
            [Problem(KEY, f"adapter, but {reason}", wanted_text, f"set {KEY} to merged or auto")]
        )
    return AdapterSync(None, reason)


def _why_unsupported(found: PreTrainedConfig, modules: Sequence[str]) -> str | None:
    text = found.get_text_config()
    if any((getattr(text, key, None) or 0) > 1 for key in EXPERT_COUNTS):
        return f"a {found.model_type} has experts, for which engines take merged weights"
    architectures = found.architectures or []
    if not architectures:
        return "config.json names no architecture"
    return why_unsupported(architectures[0], modules)


def _linear_layers(found: PreTrainedConfig, trust_remote_code: bool) -> Iterator[str]:
    """Last names of the layers that LoRA adapts if none are named: all linear ones but the output head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name.rpartition(".")[2]
