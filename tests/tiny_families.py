"""Tiny models with random weights of families that transformers and vLLM both know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 128, 256, 2, 4, 2  # a head size of 32, which vLLM takes on a CPU too
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _llama_like(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
    } | more


# Name of transformers' config class -> its arguments.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _llama_like()),
    "qwen2": ("Qwen2Config", _llama_like(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", _llama_like(head_dim=32)),
    "gemma": ("GemmaConfig", _llama_like(head_dim=32)),
    "gemma3": ("Gemma3TextConfig", _llama_like(head_dim=32, sliding_window=512)),
    "phi3": ("Phi3Config", _llama_like()),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 512,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 512}),
    "mixtral": ("MixtralConfig", _llama_like(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _llama_like(shared_expert_intermediate_size=64, decoder_sparse_step=1, **EXPERTS),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _llama_like(head_dim=32, norm_topk_prob=True, **EXPERTS)),
}
# Not with vLLM's CPU build, whose latent attention gives other log-probabilities than transformers, by nats,
# without experts too.
TRAINED_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    # A dense layer first, then sigmoid scores, groups of experts and a shared expert.
    "deepseek_v3": (
        "DeepseekV3Config",
        _llama_like(
            num_key_value_heads=HEADS,
            first_k_dense_replace=1,
            num_hidden_layers=3,
            q_lora_rank=32,
            kv_lora_rank=512,  # the size that vLLM has on a CPU, with the rotary one
            qk_nope_head_dim=16,
            qk_rope_head_dim=64,
            v_head_dim=32,
            n_routed_experts=8,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            topk_method="noaux_tc",  # as in the published config, like the next; read by vLLM
            scoring_func="sigmoid",
        ),
    ),
}


def make_family(path: str | Path, family: str, *, seed: int = 0) -> str:
    """Saves a model of `FAMILIES` or `TRAINED_ONLY` (float32, safetensors) with the byte-level tokenizer."""
    import torch
    import transformers

    name, settings = (FAMILIES | TRAINED_ONLY)[family]
    make_config: Callable[..., Any] = getattr(transformers, name)
    tokenizer = make_tokenizer()
    config = make_config(
        vocab_size=len(tokenizer),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        dtype="float32",
        **({"init_std": 0.15} if family == "opt" else {"initializer_range": 0.15}),
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
