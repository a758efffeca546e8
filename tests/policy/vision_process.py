"""What `one_process` needs for prompts with images of four colours, and a reward of the image."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.data.images import opened
from rayrlhf.models.checkpoint_tensors import CheckpointTensors
from rayrlhf.reward.client import RewardClient
from rayrlhf.samples import EncodedImage, Prompt, Sample
from tests.policy.one_process import Engine
from tests.tiny_vision import IMAGE_PAD, image_ids, png

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
IMAGES = [EncodedImage(png(width=16, height=16, colour=colour), 4) for colour in COLOURS]
NEW_TOKENS = 4


class VisionEngine(Engine):
    """Samples with transformers' own forward pass: its positions, and its merge of images."""

    def __init__(self, config: PolicyRunConfig) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(config.model.path).eval()
        self.processor = AutoImageProcessor.from_pretrained(config.model.path)
        self.seed = config.run.seed
        self.version = 0
        self.pushed: list[int] = []
        self.min_versions: list[int] = []

    def push(self, weights: Iterable[CheckpointTensors], version: int, *, verify: bool = False) -> None:
        """Loaded as from a checkpoint, whose names differ from those in memory."""
        state = {
            spec.name: tensor.clone()
            for made_together in weights
            for spec, tensor in zip(made_together.specs, made_together.tensors(), strict=True)
        }
        with tempfile.TemporaryDirectory() as folder:
            self.model.config.save_pretrained(folder)
            save_file(state, Path(folder, "model.safetensors"), metadata={"format": "pt"})
            loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        self.model, found = loaded
        assert not found["missing_keys"] and not found["unexpected_keys"], found
        self.model.eval()
        self.version = version
        self.pushed.append(version)

    @torch.no_grad()
    def generate(self, prompt: Prompt, group_id: int, index: int, temperature: float) -> Sample:
        generator = torch.Generator().manual_seed(10**7 * self.seed + 1000 * group_id + index)
        pictures = [opened(image.content) for image in prompt.images]
        pixels = self.processor(images=pictures, return_tensors="pt")
        ids, logprobs = list(prompt.prompt_ids), []
        for _ in range(NEW_TOKENS):
            tokens = torch.tensor([ids])
            output = self.model(
                input_ids=tokens, mm_token_type_ids=(tokens == IMAGE_PAD).int(), use_cache=False, **pixels
            )
            of_tokens = (output.logits[0, -1].float() / temperature).log_softmax(-1)
            of_tokens[IMAGE_PAD] = -torch.inf  # transformers would take it for an image
            token = int(torch.multinomial(of_tokens.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(of_tokens[token]))
        response = ids[len(prompt.prompt_ids) :]
        return Sample(
            group_id=group_id,
            sample_index=index,
            prompt=prompt,
            response_ids=response,
            response="",
            rollout_logprobs=logprobs,
            loss_mask=[1] * len(response),
            policy_versions=[self.version] * len(response),
            truncated=False,
        )


class ColourScorer(RewardClient):
    """Share of tokens whose number says the colour, modulo 4: a policy that ignores the image gets a quarter,
    whatever it does.
    """

    def __init__(self, config: PolicyRunConfig) -> None:
        super().__init__([], config.reward)

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        return [replace(sample, source_rewards=(named(sample),)) for sample in samples]


def named(sample: Sample) -> float:
    colour = IMAGES.index(sample.prompt.images[0])
    return sum(token % 4 == colour for token in sample.response_ids) / len(sample.response_ids)


def colour_batches(first: int, size: int) -> Iterator[tuple[int, list[Prompt]]]:
    number = first
    while True:
        rows = range(number * size, (number + 1) * size)
        yield number, [prompt(row, IMAGES[row % 4]) for row in rows]
        number += 1


def prompt(row: int, image: EncodedImage) -> Prompt:
    return Prompt(row, [1, 4, *image_ids(image), 2, 5], "", images=(image,))
