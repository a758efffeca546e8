"""A checkpoint folder of a few kilobytes, written byte by byte: no torch, and every part can be spoilt."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

SIZES = {"F32": 4, "BF16": 2, "I64": 8}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {f"t{n}": n for n in range(14)}, "merges": []},
    "added_tokens": [{"id": 14, "content": "<s>"}, {"id": 15, "content": "</s>"}],
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "chat_template": "{{ x }}",
}


def tensors(layers: int = 2) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape, of CONFIG: 4 heads of size 2, so 8 for queries and 4 for keys and values."""
    found: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("F32", [16, 8]),
        "model.norm.weight": ("F32", [8]),
        "lm_head.weight": ("F32", [16, 8]),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", [8, 8]),
            ("self_attn.k_proj", [4, 8]),
            ("self_attn.v_proj", [4, 8]),
            ("self_attn.o_proj", [8, 8]),
            ("mlp.gate_proj", [12, 8]),
            ("mlp.up_proj", [12, 8]),
            ("mlp.down_proj", [8, 12]),
        ):
            found[f"{at}{name}.weight"] = ("F32", shape)
    return found


def safetensors_bytes(heads: dict[str, tuple[str, list[int]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in heads.items():
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(position)


def write_checkpoint(folder: Path, **config: Any) -> Path:
    """A whole one; `config` changes its config.json, where None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors()))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


def write_shards(folder: Path, count: int = 2) -> Path:
    """The same in shards with an index."""
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors())
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    places = {name: files[index % count] for index, name in enumerate(names)}
    for file in files:
        heads = {name: head for name, head in tensors().items() if places[name] == file}
        (folder / file).write_bytes(safetensors_bytes(heads))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
