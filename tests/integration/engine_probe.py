"""One real vLLM engine and a trainer's model in one process, without Ray: do they agree after pushes?

`python -m tests.integration.engine_probe FOLDER [SAMPLING …]` prints one line of JSON: the largest
|log-probability of the trainer's model - of the engine| over sampled tokens, before any push, after a push of
the same weights, and after a push of other ones; then for each SAMPLING (a `rollout.sampling` in JSON), and
after a push that followed one that broke off. A verified push must name the tensor that it lost, and one
without one of the tensors must be refused. vLLM wants a separate process, with its environment set before its
import.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

PROMPTS = [[1, *range(20 + i, 40 + i)] for i in range(4)]
SAMPLING = {"max_new_tokens": 24}
GREEDY_TOKENS = 12
BUCKET_BYTES = 100_000  # several buckets, and layers that are whole only after some of them
MIDDLE = 4  # a bucket, whose last tensor is in some families one of many that a layer is made of


def main(folder: str, *samplings: str) -> None:
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
    tried = [json.loads(sampling) for sampling in samplings]
    differences = asyncio.run(_differences(folder, model, settings.engine_args, tried))
    print(json.dumps(differences), flush=True)
    os._exit(0)  # the stepper's thread waits for more


async def _differences(
    folder: str, model: Any, engine_args: dict[str, Any], samplings: list[dict[str, Any]]
) -> list[float]:
    import torch

    from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
    from rayrlhf.models.load import load_policy
    from rayrlhf.rollout.vllm_engine import Stepper
    from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets
    from rayrlhf.weights.checksum import checksum

    policy = load_policy(model, folder, device=torch.device("cpu"), chunk_tokens=1000).eval()
    stepper = Stepper(engine_args)
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert threads.count("gloo_tcp_loop") <= 2, "vLLM's groups of one rank are one"

    def checksums() -> dict[str, int]:
        return {
            spec.name: checksum(tensor)
            for group in checkpoint_tensors(policy.causal_lm)
            for spec, tensor in zip(group.specs, group.tensors(), strict=True)
        }

    async def push(
        version: int,
        *,
        without: int | None = None,
        breaks_off_at: int | None = None,
        lost: str | None = None,
    ) -> None:
        await stepper.pause()
        await stepper.start_weight_update(verify=lost is not None)
        for index, group in enumerate(plan_buckets(checkpoint_tensors(policy.causal_lm), BUCKET_BYTES)):
            slices = lay_out(group)
            flat = flatten(group, slices).numpy()
            for piece in slices:
                if piece.name == lost:
                    flat[piece.offset_bytes : piece.offset_bytes + piece.num_bytes] = 0
            if index == breaks_off_at:
                slices = [replace(slices[0], dtype="no dtype")]
            await stepper.load_bucket(slices[:-1] if index == without else slices, flat)
            flat[:] = 255  # the next bucket reuses the memory: keeping views of it is an error
        await stepper.finish_weight_update(version)
        await stepper.resume()

    differences = [await _difference(policy, stepper)]
    await push(1)
    differences.append(await _difference(policy, stepper))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std())
    await push(2)
    differences += [await _difference(policy, stepper, sampling) for sampling in [SAMPLING, *samplings]]
    await _refused(push(3, breaks_off_at=MIDDLE), "is not a dtype")
    await push(3)  # as from the object store, after a direct push that broke off
    differences.append(await _difference(policy, stepper))
    assert await _greedy(stepper) == _continued(policy, folder), "the weights that were pushed"
    await push(4, lost="none of them")
    assert await stepper.differences(checksums()) == {}
    for lost in list(checksums())[1:-1:3]:
        await push(5, lost=lost)
        assert await stepper.differences(checksums()) == {lost: "received with other values"}
    await _refused(push(6, without=MIDDLE), "at their old values")
    return differences


async def _greedy(stepper: Any) -> list[list[int]]:
    params = {"max_tokens": GREEDY_TOKENS, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
    return [
        list(output.outputs[0].token_ids)
        for prompt in PROMPTS
        async for _, output in stepper.stream(prompt, [params])
    ]


def _continued(policy: Any, folder: str) -> list[list[int]]:
    """Greedy tokens by plain transformers, with the policy's weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.load_state_dict(policy.causal_lm.state_dict())
    continued = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(GREEDY_TOKENS):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        continued.append(ids[len(prompt) :])
    return continued


async def _refused(push: Awaitable[None], why: str) -> None:
    try:
        await push
    except (RuntimeError, ValueError) as refusal:
        assert why in str(refusal), refusal
    else:
        raise AssertionError("a broken push was taken for whole")


async def _difference(policy: Any, stepper: Any, given: dict[str, Any] = SAMPLING) -> float:
    import torch

    from rayrlhf.batch import cu_seqlens_of, position_ids_of
    from rayrlhf.config.rollout import SamplingConfig
    from rayrlhf.data.ends import response_ends
    from rayrlhf.rollout.client import vllm_params
    from tests.tiny_model import make_tokenizer

    sampling = SamplingConfig(**given)
    ends = response_ends(sampling.stop, make_tokenizer(), apply_chat_template=True)

    ids: list[int] = []
    mask: list[float] = []
    theirs: list[float] = []
    lengths: list[int] = []
    for seed, prompt in enumerate(PROMPTS):
        async for _, output in stepper.stream(prompt, [vllm_params(sampling, ends, seed=seed)]):
            [completion] = output.outputs
            tokens = list(completion.token_ids)
            assert not {*ends.token_ids} & {*tokens[:-1]}, f"{tokens} goes on behind one of {ends.token_ids}"
            logprobs = [at[token].logprob for token, at in zip(tokens, completion.logprobs, strict=True)]
            ids += [*prompt, *tokens]
            mask += [*[0.0] * len(prompt), *[1.0] * len(tokens)]
            theirs += [*[0.0] * len(prompt), *logprobs]
            lengths.append(len(prompt) + len(tokens))
    with torch.no_grad():
        ours = policy(
            torch.tensor(ids),
            position_ids_of(lengths),
            cu_seqlens_of(lengths),
            torch.tensor(mask),
            sampling.temperature,
        ).logprobs
    return (ours - torch.tensor(theirs)).abs().max().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
