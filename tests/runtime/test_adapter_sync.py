"""Which pushes send LoRA adapters alone: decided before a model is loaded, from config and config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.runtime.adapter_sync import adapter_sync
from rayrlhf.weights.lora_support import why_unsupported

LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def config_of(path: str, *, lora: dict[str, Any] | None, sync: str = "auto") -> PolicyRunConfig:
    tree: dict[str, Any] = {
        "run": {"name": "adapters"},
        "model": {"path": path, "lora": lora},
        "data": {"train": "prompts.jsonl"},
        "rollout": {"weight_sync": {"lora": sync}},
        "reward": {"sources": [{"type": "function", "function": "m:f"}]},
        "train": {"num_steps": 1},
    }
    return PolicyRunConfig.model_validate(tree)


def folder_of(tmp_path: Path, **config: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_auto_sends_a_llamas_adapters_alone(tiny_model: str) -> None:
    sync = adapter_sync(config_of(tiny_model, lora={"rank": 4}))
    assert sync.adapter is not None and sync.adapter.target_modules == LLAMA  # all linear layers but the head
    assert sync.line() == "LoRA adapters reach the engines alone; they add them to the base model"
    some = adapter_sync(config_of(tiny_model, lora={"target_modules": ["q_proj"]}, sync="adapter"))
    assert some.adapter is not None and some.adapter.target_modules == ["q_proj"]


def test_a_run_can_ask_for_merged_ones(tiny_model: str) -> None:
    assert adapter_sync(config_of(tiny_model, lora=None)).adapter is None
    sync = adapter_sync(config_of(tiny_model, lora={}, sync="merged"))
    assert sync.adapter is None
    assert sync.line() == (
        "LoRA adapters are merged into all weights of a push: rollout.weight_sync.lora=merged"
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no LoRA in vLLM's model": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 1, "n_head": 2},
        "vLLM's GPT2LMHeadModel takes no LoRA adapters",
    ),
    "experts": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, **SMALL},
        "a mixtral has experts",
    ),
    "code of transformers": (
        {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **SMALL},
        "vLLM runs Olmo2ForCausalLM with transformers' code",
    ),
    "images": (
        {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        "a qwen2_5_vl reads images",
    ),
    "no architecture": ({"model_type": "llama", **SMALL}, "config.json names no architecture"),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED)
def test_auto_merges_and_says_why_where_adapter_is_refused(
    tmp_path: Path, model: dict[str, Any], reason: str
) -> None:
    folder = folder_of(tmp_path, **model)
    sync = adapter_sync(config_of(folder, lora={}))
    assert sync.adapter is None and reason in sync.line()
    with pytest.raises(ConfigError) as refused:
        adapter_sync(config_of(folder, lora={}, sync="adapter"))
    [problem] = refused.value.problems
    assert problem.path == "rollout.weight_sync.lora" and reason in problem.got
    assert "merged or auto" in problem.fix


def test_support_is_read_from_vllms_source() -> None:
    assert why_unsupported("Qwen3ForCausalLM", LLAMA) is None  # its MLP is in another file, qwen2
    assert why_unsupported("MistralForCausalLM", LLAMA) is None  # a subclass of Llama's
    assert why_unsupported("LlamaForCausalLM", ["q_proj", "w_proj"]) == (
        "vLLM's LlamaForCausalLM has no layer w_proj"
    )
    assert why_unsupported("NobodysForCausalLM", []) == "vLLM has no model of its own for NobodysForCausalLM"
