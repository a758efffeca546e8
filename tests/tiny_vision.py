"""A Qwen2.5-VL of 300 thousand parameters with its image processor, and images, made on the spot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.samples import EncodedImage
from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
FIRST_VISION_TOKEN = 264  # behind the byte-level ones
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(FIRST_VISION_TOKEN, FIRST_VISION_TOKEN + 4)
PATCH, MERGE = 4, 2  # a token stands for 8 x 8 pixels
# As Qwen2.5-VL's: a content is a text, or parts, of which images are rendered as one placeholder each.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_vision_tokenizer() -> Any:
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS})
    assert len(tokenizer) == VIDEO_PAD + 1
    return tokenizer


def make_tiny_vision(path: str | Path, *, tied: bool = True, seed: int = 0) -> str:
    """Saves model (float32), tokenizer and image processor to the folder `path`, and returns it.

    Two language layers; two tower layers, of which the first attends within windows of 16 x 16 pixels.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VIDEO_PAD + 5,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": tied,
            "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
            "bos_token_id": SPECIAL_TOKENS.index("<s>"),
            "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 16,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.15,
        },
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(path)
    make_vision_tokenizer().save_pretrained(path)
    size: Any = {"shortest_edge": 64, "longest_edge": 1024}  # pixels in all
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size).save_pretrained(path)
    return str(path)


def png(*, width: int = 16, height: int = 16, seed: int | None = None, colour: Any = (0, 0, 0)) -> bytes:
    """An image of one colour, or with a `seed` of noise."""
    from PIL import Image

    pixels = np.zeros((height, width, 3), dtype=np.uint8) + np.array(colour, dtype=np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image(*, width: int, height: int, seed: int) -> EncodedImage:
    """Of multiples of 8 pixels, within the processor's limits: it is not resized."""
    return EncodedImage(png(width=width, height=height, seed=seed), width * height // 64)


def image_ids(image: EncodedImage) -> list[int]:
    return [VISION_START, *[IMAGE_PAD] * image.num_tokens, VISION_END]
