"""As `engine_probe`, for prompts with images: do engine and trainer agree, also after pushes of the tower?

`python -m tests.integration.vision_probe FOLDER` prints one line of JSON with the largest |log-probability of
the trainer's model - of the engine|: before any push, after one of the same weights, after one of others (the
same images: their old encodings must be gone), and for requests during which weights were pushed, of the
tokens after the push. A prompt with other numbers of image tokens than the engine makes must be refused, and
a push without a tensor of the tower.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from rayrlhf.samples import EncodedImage, Prompt, Sample
from tests.integration.engine_probe import BUCKET_BYTES, _refused
from tests.tiny_vision import image, image_ids

WIDE, TALL = image(width=40, height=16, seed=1), image(width=8, height=24, seed=2)
PROMPTS = [
    Prompt(0, [1, 4, *image_ids(WIDE), 100, 101, 2, 5], "", images=(WIDE,)),
    Prompt(1, [1, 4, 77, 78, 2, 5], ""),
    Prompt(2, [1, 4, *image_ids(TALL), 99, *image_ids(WIDE), 2, 5], "", images=(TALL, WIDE)),
]
NEW_TOKENS = 40
PARAMS = {"temperature": 1.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0}


def main(folder: str) -> None:
    from rayrlhf.config.model import ModelConfig
    from rayrlhf.config.rollout import EngineConfig
    from rayrlhf.rollout.engine_settings import engine_settings

    model = ModelConfig(path=folder, dtype="float32")
    settings = engine_settings(
        model,
        EngineConfig(kv_cache_bytes=64 * 2**20),
        seed=0,
        max_model_tokens=128,
        weight_store=None,
        on_gpu=False,
        threads=1,
    )
    os.environ.update(settings.env_vars)
    print(json.dumps(asyncio.run(_differences(folder, model, settings.engine_args))), flush=True)
    os._exit(0)  # the stepper's thread waits for more


async def _differences(folder: str, model: Any, engine_args: dict[str, Any]) -> list[float]:
    import torch

    from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
    from rayrlhf.models.load import load_policy
    from rayrlhf.rollout.vllm_engine import Stepper
    from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets

    policy = load_policy(model, folder, device=torch.device("cpu"), chunk_tokens=1000).eval()
    stepper = Stepper(engine_args)

    async def push(version: int, without: str = "nothing") -> None:
        """`without`: the last tensor of each bucket is left out if its name begins so."""
        await stepper.pause()
        await stepper.start_weight_update()
        for group in plan_buckets(checkpoint_tensors(policy.causal_lm), BUCKET_BYTES):
            slices = lay_out(group)
            flat = flatten(group, slices).numpy()
            await stepper.load_bucket(slices[:-1] if slices[-1].name.startswith(without) else slices, flat)
            flat[:] = 255  # the next bucket reuses the memory: keeping views of it is an error
        await stepper.finish_weight_update(version)
        await stepper.resume()

    def change(seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std())

    differences = [await _difference(policy, stepper)]
    await push(1)
    differences.append(await _difference(policy, stepper))
    change(0)
    await push(2)
    differences.append(await _difference(policy, stepper))
    running = [asyncio.ensure_future(_generate(stepper, prompt, seed)) for seed, prompt in enumerate(PROMPTS)]
    await asyncio.sleep(0.05)
    change(1)
    await push(3)
    outputs = await asyncio.gather(*running)
    new = [_num_new(output, "3") for output in outputs]
    assert any(0 < count < NEW_TOKENS for count in new), f"{new} of {NEW_TOKENS} tokens after the push"
    differences.append(_compared(policy, outputs, new))
    await _refused(_wrong_image(stepper), "its image processor differs")
    await _refused(push(4, without="visual."), "at their old values, among them ['visual.")
    return differences


async def _wrong_image(stepper: Any) -> None:
    wrong = EncodedImage(WIDE.content, WIDE.num_tokens - 1)
    prompt = Prompt(0, [1, 4, *image_ids(wrong), 100, 2, 5], "", images=(wrong,))
    await _generate(stepper, prompt, 0)


async def _generate(stepper: Any, prompt: Prompt, seed: int) -> Any:
    params = [{**PARAMS, "seed": seed}]
    [(_, output)] = [item async for item in stepper.stream(prompt.prompt_ids, params, prompt.images)]
    return output


async def _difference(policy: Any, stepper: Any) -> float:
    outputs = [await _generate(stepper, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    return _compared(policy, outputs, [NEW_TOKENS] * len(PROMPTS))


def _num_new(output: Any, version: str) -> int:
    spans = output.outputs[0].weight_versions or []
    return sum(span.end - span.start for span in spans if span.version == version)


def _compared(policy: Any, outputs: list[Any], last: list[int]) -> float:
    """Over the last `last[i]` tokens of each output."""
    import torch

    from rayrlhf.batch import pack_samples

    samples, theirs = [], []
    for prompt, output, count in zip(PROMPTS, outputs, last, strict=True):
        [completion] = output.outputs
        tokens = list(completion.token_ids)
        logprobs = [at[token].logprob for token, at in zip(tokens, completion.logprobs, strict=True)]
        mask = [0] * (len(tokens) - count) + [1] * count
        samples.append(Sample(0, 0, prompt, tokens, "", logprobs, mask, [0] * len(tokens), False, score=0.0))
        theirs.append(logprobs)
    batch = pack_samples(samples)
    with torch.no_grad():
        ours = policy(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, images=batch.images
        ).logprobs
    return (ours - batch.rollout_logprobs).abs().max().item()


if __name__ == "__main__":
    main(sys.argv[1])
