"""Reads the images of rows, and gives each as many image tokens as the model's image processor makes of it.

Images are read once, when the data are prepared, and stored as in their files: a broken or missing one is
found before anything starts, workers on other nodes need neither the files nor the network, and the run's
fingerprint covers them. Pixel values, a hundred times larger, are made late (`rayrlhf.models.vision`).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import time
import urllib.request
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayrlhf.data.rows.images import MARK, ImageRef, has_placeholders
from rayrlhf.data.rows.messages import Message
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.hub.local import local_folder
from rayrlhf.samples import EncodedImage

# Model types whose images are used; others are trained on text only. Their packed streams are compared with
# transformers' own forward pass in tests/models/test_vision.py.
FAMILIES = ("qwen2_5_vl",)
MAX_IMAGE_BYTES = 64 << 20
DOWNLOAD_CHUNK_BYTES = 1 << 16


class ImageReader:
    """Reads the images of one model's rows."""

    def __init__(self, processor: Any, config: Mapping[str, Any], *, timeout_seconds: float) -> None:
        """`config`: the model's."""
        self.processor = processor
        self.image_token_id: int = config["image_token_id"]
        markers = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        self.never_learned = frozenset(config[name] for name in markers if config.get(name) is not None)
        self.timeout_seconds = timeout_seconds

    def read(self, refs: Sequence[ImageRef], folder: str) -> tuple[EncodedImage, ...]:
        """The images; paths are relative to `folder`. Raises `BadRow` for one that cannot be read."""
        return tuple(self._read(ref, folder, number) for number, ref in enumerate(refs, start=1))

    def _read(self, ref: ImageRef, folder: str, number: int) -> EncodedImage:
        where = f"image {number}" + (f" ({ref[:100]})" if isinstance(ref, str) else "")
        content = self._content(ref, folder, where)
        try:
            width, height = opened(content).size
            patches = self.processor.get_number_of_image_patches(height, width, {})
        except Exception as error:  # PIL and processors raise many kinds
            raise BadRow(f"{where} is not a usable image: {error}") from error
        return EncodedImage(content, int(patches) // self.processor.merge_size**2)

    def _content(self, ref: ImageRef, folder: str, where: str) -> bytes:
        if isinstance(ref, bytes):
            return ref
        if ref.startswith("data:"):
            head, _, text = ref.partition(",")
            try:
                if not head.endswith(";base64"):
                    raise ValueError("wanted data:<type>;base64,<text>")
                return base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadRow(f"{where} is a broken data: URL: {error}") from error
        try:
            if ref.startswith(("http://", "https://")):
                return _downloaded(ref, self.timeout_seconds)
            path = Path(folder, ref.removeprefix("file://"))
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise BadRow(f"{where} has more than {MAX_IMAGE_BYTES >> 20} MiB")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            looked = "" if "://" in ref else f" (paths are relative to {folder})"
            raise BadRow(f"{where} cannot be read: {error}{looked}") from error


def _downloaded(url: str, timeout_seconds: float) -> bytes:
    """The body of a response that is complete within the deadline. Raises `OSError`."""
    deadline = time.monotonic() + timeout_seconds
    body = io.BytesIO()
    with urllib.request.urlopen(url, timeout=timeout_seconds) as response:
        while chunk := response.read1(DOWNLOAD_CHUNK_BYTES):
            body.write(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {timeout_seconds:g} s (data.image_timeout_seconds)")
            if body.tell() > MAX_IMAGE_BYTES:
                raise OSError(f"more than {MAX_IMAGE_BYTES >> 20} MiB")
    return body.getvalue()


@lru_cache(maxsize=4)
def image_reader(path: str, trust_remote_code: bool, timeout_seconds: float) -> ImageReader | None:
    """The reader for the model at `path`, made once per process; None for a model without vision."""
    file = Path(local_folder(path, weights=False), "config.json")
    config = json.loads(file.read_text()) if file.is_file() else {}
    if config.get("model_type") not in FAMILIES:
        return None
    try:
        processor = image_processor(path, trust_remote_code)
    except Exception as error:  # a broken configuration may raise anything
        raise DataError(f"no image processor can be loaded from {path}: {error}") from error
    return ImageReader(processor, config, timeout_seconds=timeout_seconds)


@lru_cache(maxsize=4)
def image_processor(path: str, trust_remote_code: bool = False) -> Any:
    """The checkpoint's image processor, loaded once per process.

    Without torchvision, transformers takes the one that computes with PIL and numpy.
    """
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(
        local_folder(path, weights=False), trust_remote_code=trust_remote_code
    )


def opened(content: bytes) -> Any:
    """The PIL image in a file's content, in RGB and upright (photos have their rotation in EXIF), as by
    transformers' `load_image`.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def folder_of(data_file: str) -> str:
    return os.path.dirname(os.path.abspath(data_file)) if data_file else os.getcwd()


def images_of(
    images: Sequence[ImageRef], messages: Sequence[Message], reader: ImageReader | None, folder: str
) -> tuple[tuple[EncodedImage, ...], list[str]]:
    """The images of a conversation, and notes on what was left out.

    Raises `BadRow` for placeholders with a model without vision (no `reader`), and for images without them.
    """
    if not images:
        return (), []
    if reader is None:
        if has_placeholders(messages):
            raise BadRow(f"it has images, which only models of type {' or '.join(FAMILIES)} see here")
        return (), ["images left out, which the model cannot see"]
    if not has_placeholders(messages):
        raise BadRow(
            f"{len(images)} images without a placeholder; wanted one for each: a content part "
            f'{{"type": "image"}}, or {MARK} in a text of the user'
        )
    return reader.read(images, folder), []


def num_tokens_of_each(
    input_ids: Sequence[int], images: Sequence[EncodedImage], image_token_id: int
) -> list[int]:
    """How often each token is repeated, [t], so that a placeholder becomes the tokens of its image.

    Raises `BadRow` if there are not as many placeholders as images.
    """
    places = [place for place, token in enumerate(input_ids) if token == image_token_id]
    if len(places) != len(images):
        raise BadRow(
            f"the chat template writes {len(places)} image placeholders for {len(images)} images; "
            "set a template that renders images with data.chat_template"
        )
    repeats = [1] * len(input_ids)
    for place, image in zip(places, images, strict=True):
        repeats[place] = image.num_tokens
    return repeats


def repeated(values: Sequence[Any], repeats: Sequence[int]) -> list[Any]:
    return [value for value, count in zip(values, repeats, strict=True) for _ in range(count)]


def check_not_cut(
    input_ids: Sequence[int], images: Sequence[EncodedImage], image_token_id: int, limit: str
) -> None:
    """Raises `BadRow` if truncation has removed tokens of an image. `limit`: such as data.max_tokens=512."""
    wanted = sum(image.num_tokens for image in images)
    left = sum(token == image_token_id for token in input_ids)
    if left != wanted:
        raise BadRow(
            f"{limit} would cut {wanted - left} of the {wanted} tokens of its images; raise it, or drop "
            "long rows instead of truncating them"
        )
