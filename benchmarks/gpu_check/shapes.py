"""Models of known sizes from their configs alone, their FLOPs, and the peak of a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

# name: vocabulary, hidden, intermediate, layers, heads, kv heads, tied
SIZES = {
    "tiny": (1000, 128, 512, 2, 4, 1, True),
    "tiny, untied": (1000, 128, 512, 2, 4, 2, False),
    "1b": (128_256, 2048, 8192, 16, 32, 8, True),  # Llama-3.2-1B
    "8b": (128_256, 4096, 14_336, 8, 32, 8, False),  # Llama-3.1-8B with 8 of its 32 layers
}


def llama(name: str) -> LlamaConfig:
    vocabulary, hidden, intermediate, layers, heads, kv_heads, tied = SIZES[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


def update_flops(config: LlamaConfig, lengths: Sequence[int], num_loss_tokens: int) -> float:
    """Of a forward and a backward pass over packed sequences, without what checkpointing computes again.

    2 per weight and token forward, twice that backward; the head on loss tokens only. Attention: two products
    of [length, head_dim] matrices per head, half of whose results are behind the causal mask.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = hidden // heads
    of_attention = hidden * head_dim * (2 * heads + 2 * (config.num_key_value_heads or heads))
    of_layer = of_attention + 3 * hidden * config.intermediate_size
    linear = 2 * sum(lengths) * config.num_hidden_layers * of_layer
    head = 2 * num_loss_tokens * config.vocab_size * hidden
    attention = config.num_hidden_layers * sum(2 * hidden * length * (length + 1) for length in lengths)
    return 3.0 * (linear + head + attention)


def peak_tflops(device: str) -> float | None:
    """Dense bf16, of a device by torch's name of it; None for one that is not in the planner's table."""
    from rayrlhf.capacity.gpu_types import GPUS  # with pydantic

    words = device.replace("-", " ").replace("RTX ", "RTX").split()
    if {"PCIe", "NVL", "Laptop", "D", "Ti"} & set(words) and "A100" not in words:
        return None  # less than the type that is in the table
    return next((gpu.tflops for name, gpu in GPUS.items() if name.partition("-")[0] in words), None)
