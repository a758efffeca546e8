"""Weights change while requests run that keep their cache; prints one line of JSON.

In a process of its own: importing vLLM takes seconds and changes torch's settings.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from rayrlhf.config.model import ModelConfig
from rayrlhf.config.rollout import RolloutConfig
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets
from tests.tiny_model import make_tiny_model

PROMPT = [1, *range(20, 90)]
COUNT = 400
PARAMS = {"max_tokens": COUNT, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}


def greedy(model: Any, ids: list[int], count: int, cache: Any = None) -> tuple[list[int], Any]:
    """`count` tokens after `ids`, of which the cache has all but those that it lacks; and the cache."""
    cache, ids = cache or DynamicCache(config=model.config), list(ids)
    with torch.no_grad():
        for _ in range(count):
            new = torch.tensor([ids[cache.get_seq_length() :]])
            ids.append(int(model(new, past_key_values=cache).logits[0, -1].argmax()))
    return ids[len(ids) - count :], cache


def _num_generated(stepper: Any) -> int:
    """Tokens of the running request so far."""
    requests = stepper._engine.engine_core.engine_core.scheduler.requests.values()
    return max((request.num_output_tokens for request in requests), default=0)


async def probe(folder: str) -> dict[str, Any]:
    path = make_tiny_model(folder)
    settings = engine_settings(
        ModelConfig(path=path, dtype="float32"),
        RolloutConfig(kv_cache_bytes=64 * 2**20),
        seed=0,
        max_model_tokens=512,
        weight_store=None,
        on_gpu=False,
        threads=1,
    )
    os.environ.update(settings.env_vars)
    from rayrlhf.rollout.vllm_engine import Stepper

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stepper = Stepper(settings.engine_args, keeps_cache=True)

    async def generated() -> Any:
        [(_, output)] = [item async for item in stepper.stream(PROMPT, [PARAMS])]
        return output.outputs[0]

    async def push(version: int) -> None:
        await stepper.pause()
        await stepper.start_weight_update()
        for group in plan_buckets(checkpoint_tensors(model), 100_000):
            slices = lay_out(group)
            await stepper.load_bucket(slices, flatten(group, slices).numpy())
        await stepper.finish_weight_update(version)
        await stepper.resume()

    before, _ = greedy(model, PROMPT, COUNT)
    assert list((await generated()).token_ids) == before  # and the prompt is in the prefix cache
    running = asyncio.ensure_future(generated())
    while await stepper._on_thread(lambda: _num_generated(stepper)) < COUNT // 10:
        await asyncio.sleep(0.001)
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
    await push(1)
    output = await running
    kept = next(span.end for span in output.weight_versions if span.version == "default")
    new = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    # By hand: the old model computes all but the newest of the kept tokens, the new one goes on.
    model.load_state_dict(old, strict=False)
    _, cache = greedy(model, PROMPT, kept)
    model.load_state_dict(new, strict=False)
    expected, _ = greedy(model, PROMPT + before[:kept], COUNT - kept, cache)
    recomputed, _ = greedy(model, PROMPT + before[:kept], COUNT - kept)
    return {
        "kept": kept,
        "of_old": list(output.token_ids[:kept]) == before[:kept],
        "goes_on": list(output.token_ids[kept:]) == expected,
        "differs": expected != recomputed,
        "new_request": list((await generated()).token_ids) == greedy(model, PROMPT, COUNT)[0],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(probe(folder))))
