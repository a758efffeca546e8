"""Small copy of a model, from its config alone: few layers, but one of every type that the model has.

Everything that determines how tokens mix is kept: the layer types and their order, the type of rotary
embedding, multipliers, the ratio of key-value heads. Widths, experts and the vocabulary are reduced. Windows
and position limits are reduced such that the test's longest sequence relates to them as the run's longest
sequence does to the model's.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

LENGTHS = (9, 45, 30)  # tokens of the test sequences: two exceed the narrow limits
NARROW, WIDE = 24, 96  # a window or limit that the longest of them exceeds, and one that it does not
VOCABULARY = 96
HEADS, HEAD_SIZE = 4, 16
HIDDEN = HEADS * HEAD_SIZE
CAP = 2.0  # soft caps, so that they affect scores of about 1
GAIN = 1.2  # gain of weights, so that scores and logits differ

# Values that are set if the config has them: every other width follows from these.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "lru_width", "backbone_hidden_size"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "ple_embed_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    "attention_head_dim": 2 * HEAD_SIZE,
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("swa_head_dim", "d_head", "dim_head", "attention_head_size"), HEAD_SIZE),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_head_dim", "linear_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_SIZE),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_SIZE // 2),
    "qk_head_dim": HEAD_SIZE + HEAD_SIZE // 2,
    "linear_num_key_heads": 2,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "shared_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("d_inner", "dim_ff", "feed_forward_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size", "router_hidden_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("laurel_rank", "adapter_rank", "d_rel"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 2 * HIDDEN // HEAD_SIZE),
    "mamba_d_ssm": 2 * HIDDEN,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "block_multiple_of"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    "index_block_size": 8,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention", "window_size")
WINDOWS += ("attention_window_size", "floor_scale", "rel_extent")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")
POSITIONS += ("context_length",)
CAPS = ("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
LAYERS += ("num_blocks",)
KV_HEADS = ("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads", "num_kv_heads")
TOKENS = re.compile(
    r"(^|_)(pad|bos|eos|eod|sep|cls|mask|unk|decoder_start|forced_eos|lang)_(token_)?(id|index)$"
)
PERIOD = re.compile(
    r"(period|interval|pattern|every_n_layers|_step|replace|num_dense_layers|start_index|offset)$"
)
# Lists of layer indices.
NUMBERS = re.compile(r"(_idxs|_layer_ids|moe_layers|mlp_only_layers|cross_attention_layers)$")


def small_config(config: PreTrainedConfig, longest: int | None) -> PreTrainedConfig:
    """The config of the small copy, for sequences of up to `longest` tokens; None: of any length."""
    small = copy.deepcopy(config)
    for section in _sections(small):
        _shrink(section, longest)
    vars(small).pop("quantization_config", None)  # the copy has random weights in full precision
    small.dtype = torch.float32
    return small


def _sections(config: Any) -> list[Any]:
    """The config and its nested configs, innermost first."""
    names = getattr(config, "sub_configs", {})
    inner = [each for name in names if isinstance(each := getattr(config, name, None), PreTrainedConfig)]
    return [*(section for each in inner for section in _sections(each)), config]


def _shrink(config: Any, longest: int | None) -> None:
    values = dict(vars(config))
    for name, value in values.items():
        new = _smaller(name, value, values, longest)
        if new is not value:
            setattr(config, name, new)
    _fewer_layers(config)
    _shrink_rope(config, longest)


def _smaller(name: str, value: Any, values: dict[str, Any], longest: int | None) -> Any:
    """The value for the small copy's config."""
    if isinstance(value, bool) or value is None:
        return value
    if TOKENS.search(name):
        return min(value, 2) if isinstance(value, int) else 2
    if name in CAPS:
        return CAP if value else value
    if isinstance(value, list | tuple) and name in SIZES:  # one per layer
        return [SIZES[name]] * len(value)
    if not isinstance(value, int) or value <= 0:
        return value
    if name == "head_dim" and value == values.get("qk_rope_head_dim"):  # of the rotary part
        return SIZES["qk_rope_head_dim"]
    if name == "attention_hidden_size":  # Zamba's attends to two layers' states at once
        return HIDDEN * round(value / values["hidden_size"])
    if name == "num_heads" and "state_size" in values:  # Mamba 2
        return SIZES["mamba_n_heads"]
    if name in SIZES:
        return SIZES[name]
    if name in KV_HEADS:
        heads = _first(values, ("num_attention_heads", "n_head", "n_heads"))
        return 1 if value == 1 else HEADS if value == heads else HEADS // 2
    if name in EXPERTS:
        return min(value, 4)
    if name in CHOSEN:
        return min(value, 2)
    if name in ("n_group", "num_expert_group"):
        return min(value, 2)
    if name == "topk_group":
        return 1
    if name in WINDOWS:
        return NARROW if longest is None or longest > value else WIDE
    if name in POSITIONS and not values.get("rope_parameters"):
        return WIDE
    return value


def _fewer_layers(config: Any) -> None:
    """As many of the first layers as needed to have one of every type."""
    values = dict(vars(config))
    name = next((name for name in LAYERS if isinstance(values.get(name), int)), None)
    if name is None:
        return
    total = values[name]
    lists = {
        key: each for key, each in values.items() if isinstance(each, list | tuple) and len(each) == total
    }
    lists = {key: each for key, each in lists.items() if total > 1 and not NUMBERS.search(key)}
    kinds = [tuple(str(each[layer]) for each in lists.values()) for layer in range(total)]
    count = max(kinds.index(kind) + 1 for kind in set(kinds))
    periods = [v for key, v in values.items() if PERIOD.search(key) and isinstance(v, int) and v < total]
    hybrids = [i for each in lists.values() for i, kind in enumerate(each) if kind == "hybrid"]
    if len(hybrids) > 1:  # Zamba's share weights, which takes two
        count = max(count, hybrids[1] + 1)
    numbers = [each for key, each in values.items() if NUMBERS.search(key) and isinstance(each, list)]
    periods += [layer + 1 for each in numbers for layer in each[:2]]
    count = max([count, 2, *(period + 1 for period in periods)])
    num_kinds = len(set(kinds))
    shares = bool(values.get("num_kv_shared_layers"))
    if shares:  # the last layers; one of each type before them has its own keys
        count = min(count + num_kinds, total)
        config.num_kv_shared_layers = num_kinds
    count = min(count, total)
    setattr(config, name, count)
    for key, each in lists.items():
        tail = num_kinds if shares else 0
        setattr(config, key, [*each[: count - tail], *each[total - tail :]])
    for key, each in values.items():
        if NUMBERS.search(key) and isinstance(each, list):
            setattr(config, key, [layer for layer in each if layer < count])


def _shrink_rope(config: Any, longest: int | None) -> None:
    """Adapt the rope config: frequencies of narrower heads; the limit of those for short sequences."""
    found = vars(config).get("rope_parameters")
    if not isinstance(found, dict):
        return
    by_kind = {key: each for key, each in found.items() if isinstance(each, dict)} or {"": found}
    for rope in by_kind.values():
        size = vars(config).get("qk_rope_head_dim") or vars(config).get("head_dim") or HEAD_SIZE
        half = int(size * (rope.get("partial_rotary_factor") or 1.0)) // 2
        for key in ("short_factor", "long_factor"):
            if rope.get(key):
                rope[key] = rope[key][:half]
        if rope.get("mrope_section"):
            rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        if rope.get("rope_type") == "longrope":
            limit = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            small = NARROW if longest is None or longest > limit else WIDE
            rope["original_max_position_embeddings"] = small
            if "original_max_position_embeddings" in vars(config):  # some models overwrite it with this
                config.original_max_position_embeddings = small
        if rope.get("rope_type") == "dynamic":
            limit = config.max_position_embeddings
            config.max_position_embeddings = NARROW if longest is None or longest > limit else WIDE


def _first(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights with which every layer matters: by default initialisation, tokens hardly affect each other."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            fan_in = (
                parameter[0].numel()
                if parameter.dim() == 3 and parameter.size(1) == 1
                else parameter.size(-1)
            )
            parameter.normal_(0.0, GAIN * fan_in**-0.5)
