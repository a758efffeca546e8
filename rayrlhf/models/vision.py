"""Images in packed streams: what a vision-language model needs in addition to token ids.

Rows, samples and micro-batches carry encoded images (PNG, JPEG, …). Pixel values are made here, when a
micro-batch is computed: those of a one-megapixel image take 24 MB, its file a hundredth of that. The tower
runs once per different image of a micro-batch: the samples of a group, or both answers of a pair, share it.

In addition to the legend of `rayrlhf.batch`: I  images of a packed stream
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from rayrlhf.data.images import FAMILIES, image_processor, opened
from rayrlhf.hub.local import local_folder
from rayrlhf.models.attention import packed_inputs
from rayrlhf.samples import EncodedImage

CACHE_BYTES = 256 << 20  # of pixel values: the same images are seen again by the reference and by updates

SequenceImages = Sequence[Sequence[EncodedImage]]  # [S], those of each sequence in the order of their tokens
Grid = tuple[int, int, int]  # frames, rows and columns of patches


class Pixels(NamedTuple):
    values: Tensor  # [patches, channels · patch volume] fp32
    grid: Grid


def is_vision_language(config: PreTrainedConfig) -> bool:
    """Whether rows of this model may have images."""
    return config.model_type in FAMILIES


def vision_attention(kernel: str) -> dict[str, str]:
    """`attn_implementation`: ours in the language model; the tower's images are not causal sequences."""
    return {"text_config": kernel, "vision_config": "flash_attention_2" if "flash" in kernel else "sdpa"}


def freeze_tower(model: Any) -> None:
    """Freeze the vision tower, including the layers that project its outputs to the language model's."""
    tower_of(model).requires_grad_(False)


def tower_of(model: Any) -> nn.Module:
    """The vision tower of a language model or decoder."""
    return model.base_model.visual


PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def copy_processor(source: str, folder: Path) -> None:
    """Copy the files of the processor, but for its tokenizer, from one checkpoint to another.

    Copied and not saved again: transformers cannot load all parts of a processor without torchvision.
    """
    for name in PROCESSOR_FILES:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), folder / name)


class VisionInputs:
    """Turns the images of a packed stream into the arguments of a vision-language decoder."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self._pixels: OrderedDict[bytes, Pixels] = OrderedDict()
        self.num_bytes = 0  # of pixel values kept

    @classmethod
    def of(cls, path: str, *, trust_remote_code: bool = False) -> VisionInputs | None:
        """Those of the checkpoint at `path`; None for a model without vision."""
        folder = local_folder(path, weights=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not is_vision_language(config):
            return None
        return cls(image_processor(path, trust_remote_code), config.image_token_id)

    def hidden_states(
        self,
        decoder: Any,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [S+1]
        images: SequenceImages,  # [S], or empty
    ) -> Tensor:
        """Hidden states [T, H] of packed sequences with images.

        A stream without images runs the tower on a blank one whose outputs count 0 times, where ranks must
        run the same modules: to gather partitioned weights, and to reduce their gradients.
        """
        embedded = decoder.get_input_embeddings()(input_ids)
        if not any(images):
            if _ranks_run_together(decoder.visual):
                blank = _features(decoder, [self._blank()], input_ids.device)
                embedded = embedded + 0.0 * torch.cat(blank).sum().to(embedded.dtype)
            positions = position_ids.expand(3, -1)
        else:
            places = self._places(input_ids.cpu(), cu_seqlens.tolist(), images)
            in_order = [image for of_sequence in images for image in of_sequence]
            features, grids = self._of_images(decoder, in_order, input_ids.device)
            rows = torch.cat(features).to(embedded.dtype)
            embedded = embedded.index_put((places.nonzero().squeeze(-1).to(embedded.device),), rows)
            positions = _positions(decoder, input_ids.cpu(), places, cu_seqlens.tolist(), images, grids)
        inputs = packed_inputs(input_ids, position_ids, cu_seqlens)
        del inputs["input_ids"]
        # transformers takes the first row as positions in the text, the others as M-RoPE's.
        inputs["position_ids"] = torch.cat([position_ids[None], positions.to(position_ids)])[:, None]
        return decoder(inputs_embeds=embedded[None], **inputs).last_hidden_state[0]

    def _places(self, input_ids: Tensor, bounds: list[int], images: SequenceImages) -> Tensor:
        """Which tokens stand for an image, [T] bool: in every sequence the first ones with the id of image
        tokens. Later ones were sampled by the policy, and are read as text here and by engines.

        Raises `ValueError` for too few.
        """
        places = input_ids == self.image_token_id
        for (start, stop), of_sequence in zip(pairwise(bounds), images, strict=True):
            inside = places[start:stop]
            wanted = sum(image.num_tokens for image in of_sequence)
            if int(inside.sum()) < wanted:
                raise ValueError(f"a sequence has {int(inside.sum())} image tokens for images of {wanted}")
            inside &= inside.cumsum(0) <= wanted
        return places

    def _of_images(
        self, decoder: Any, images: Sequence[EncodedImage], device: torch.device
    ) -> tuple[list[Tensor], list[Grid]]:
        """Features [tokens, H] and grid of each image; the tower runs once on equal ones.

        Raises `ValueError` if it makes other numbers of tokens than the prepared rows have.
        """
        row_of = {image: row for row, image in enumerate(dict.fromkeys(images))}
        pixels = [self.pixels(image.content) for image in row_of]
        features = _features(decoder, pixels, device)
        wanted, found = [image.num_tokens for image in row_of], list(map(len, features))
        if found != wanted:
            raise ValueError(
                f"images of {found} tokens, prepared as {wanted}: the image processor differs from the one "
                "that the data were prepared with"
            )
        rows = [row_of[image] for image in images]
        return [features[row] for row in rows], [pixels[row].grid for row in rows]

    def pixels(self, content: bytes) -> Pixels:
        """Pixel values of an image, kept for the next time as long as they fit in `CACHE_BYTES`."""
        if content in self._pixels:
            self._pixels.move_to_end(content)
            return self._pixels[content]
        made = self._processed(opened(content))
        self._pixels[content] = made
        self.num_bytes += made.values.nbytes
        while self.num_bytes > CACHE_BYTES and len(self._pixels) > 1:
            _, dropped = self._pixels.popitem(last=False)
            self.num_bytes -= dropped.values.nbytes
        return made

    def _processed(self, image: Any) -> Pixels:
        made = self.processor(images=[image], return_tensors="pt")
        frames, rows, columns = made["image_grid_thw"][0].tolist()
        return Pixels(made["pixel_values"], (frames, rows, columns))

    def _blank(self) -> Pixels:
        from PIL import Image

        return self._processed(Image.new("RGB", (32, 32)))


def _features(decoder: Any, pixels: Sequence[Pixels], device: torch.device) -> tuple[Tensor, ...]:
    """Of each image, [tokens, H]."""
    values = torch.cat([each.values for each in pixels]).to(device)
    grid = torch.tensor([each.grid for each in pixels], device=device)
    return decoder.get_image_features(values, grid, return_dict=True).pooler_output


def _positions(
    decoder: Any,
    input_ids: Tensor,  # [T]
    places: Tensor,  # [T] bool, on tokens of images
    bounds: list[int],  # [S+1]
    images: SequenceImages,  # [S]
    grids: list[Grid],  # [I]
) -> Tensor:
    """M-RoPE positions [3, T] (frame, row, column) from 0 in every sequence, by the model's own function."""
    found, left = [], list(grids)
    for (start, stop), of_sequence in zip(pairwise(bounds), images, strict=True):
        own, left = left[: len(of_sequence)], left[len(of_sequence) :]
        if not own:
            found.append(torch.arange(stop - start).expand(3, -1))
            continue
        kinds = places[None, start:stop].int()  # transformers' token types: 0 text, 1 image
        positions, _ = decoder.get_rope_index(
            input_ids[None, start:stop], mm_token_type_ids=kinds, image_grid_thw=torch.tensor(own)
        )
        found.append(positions[:, 0])
    return torch.cat(found, dim=1)


def _ranks_run_together(tower: nn.Module) -> bool:
    parameters = list(tower.parameters())
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    return is_partitioned or is_trained
