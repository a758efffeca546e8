"""Images in vLLM's prompts: one placeholder each, which its processor expands as the trainer's data are.

vLLM imports image processors that need torchvision, whose builds for CUDA break transformers on a CPU.
Without it, transformers' processors that compute with PIL take their place; there are none for videos.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

from transformers.processing_utils import ProcessorMixin, VideosKwargs

from rayrlhf.data.images import opened
from rayrlhf.samples import EncodedImage

ENGINE_ARGS: dict[str, Any] = {"limit_mm_per_prompt": {"video": 0}}


def replace_torchvision() -> None:
    """Let vLLM run models with images without torchvision. Does nothing where it is installed."""
    if importlib.util.find_spec("torchvision") is not None or _IMAGES in sys.modules:
        return
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

    module: Any = types.ModuleType(_IMAGES)
    module.smart_resize, module.Qwen2VLImageProcessor = pil.smart_resize, pil.Qwen2VLImageProcessorPil
    sys.modules[_IMAGES] = module
    attributes = ProcessorMixin.get_attributes.__func__
    mixin: Any = ProcessorMixin
    mixin.get_attributes = classmethod(lambda cls: [a for a in attributes(cls) if a != "video_processor"])
    # vLLM asks each processor for the arguments of its video processor, also if videos are off.
    mixin.video_processor = types.SimpleNamespace(valid_kwargs=VideosKwargs)
    _register_models()


_IMAGES = "transformers.models.qwen2_vl.image_processing_qwen2_vl"


def _register_models() -> None:
    """vLLM inspects known classes in another process, without these replacements; given ones in this one."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    ModelRegistry.register_model("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration)


def prompt_with(prompt_ids: list[int], images: Sequence[EncodedImage], image_token_id: int) -> dict[str, Any]:
    """vLLM's prompt, with one placeholder per image."""
    bare = with_placeholders(prompt_ids, images, image_token_id)
    pictures = [opened(each.content) for each in images]
    return {"prompt_token_ids": bare, "multi_modal_data": {"image": pictures}}


def with_placeholders(
    prompt_ids: Sequence[int], images: Sequence[EncodedImage], image_token_id: int
) -> list[int]:
    """The ids with one token instead of each image's. Raises `ValueError` for other numbers of tokens."""
    bare, left, position = [], [image.num_tokens for image in images], 0
    while position < len(prompt_ids):
        bare.append(prompt_ids[position])
        if prompt_ids[position] == image_token_id and left:
            count = left.pop(0)
            run = prompt_ids[position : position + count]
            if run != [image_token_id] * count:
                raise ValueError(f"an image of {count} tokens has {run.count(image_token_id)} in its prompt")
            position += count
        else:
            position += 1
    if left:
        raise ValueError(f"{len(left)} of {len(images)} images have no tokens in their prompt")
    return bare


def check_expanded(found: Sequence[int] | None, prompt_ids: list[int]) -> None:
    """Raises `ValueError` if the engine has made other image tokens than the trainer's data have."""
    if list(found or ()) != prompt_ids:
        raise ValueError(
            f"the engine reads {len(found or ())} tokens where the prepared prompt has {len(prompt_ids)}: "
            "its image processor differs from the one that the data were prepared with"
        )
