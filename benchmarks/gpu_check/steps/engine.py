"""vLLM's greedy tokens equal transformers', also after the engine slept and woke with pushed weights."""

from __future__ import annotations

import asyncio
import os
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_check.step import MIB, Context
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.rollout import RolloutConfig
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets
from tests.tiny_model import make_tiny_model

PROMPT, NUM_TOKENS = list(range(20, 60)), 16


def run(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(folder)
        settings = engine_settings(
            ModelConfig(path=path, dtype="float32"),
            RolloutConfig(kv_cache_bytes=64 * MIB, gpu_memory_utilization=0.3),
            seed=0,
            max_model_tokens=128,
            weight_store=None,
            on_gpu=context.on_gpu,
            threads=1,
            sleeps=True,
        )
        os.environ.update(settings.env_vars)  # before vLLM is imported
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        asyncio.run(_sleep_and_wake(context, settings.engine_args, model.to(context.device).eval()))


async def _sleep_and_wake(context: Context, engine_args: dict[str, Any], model: Any) -> None:
    from rayrlhf.rollout.vllm_engine import Stepper

    stepper = Stepper(engine_args)
    assert await _generated(stepper) == _greedy(model, context.device), "other tokens than transformers'"
    context.record("freed by sleeping", await stepper.release_memory() / MIB, "MiB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.5)
    await stepper.reacquire_memory("weights")
    await stepper.start_weight_update()
    for group in plan_buckets(checkpoint_tensors(model), 100_000):
        slices = lay_out(group)
        await stepper.load_bucket(slices, flatten(group, slices).numpy())
    await stepper.finish_weight_update(1)
    await stepper.reacquire_memory("kv_cache")
    await stepper.resume()
    assert await _generated(stepper) == _greedy(model, context.device), "other tokens after the push"
    context.record("tokens equal to transformers'", 2 * NUM_TOKENS)


async def _generated(stepper: Any) -> list[int]:
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
    [(_, output)] = [item async for item in stepper.stream(PROMPT, [sampling])]
    return list(output.outputs[0].token_ids)


@torch.no_grad()
def _greedy(model: Any, device: torch.device) -> list[int]:
    ids = list(PROMPT)
    for _ in range(NUM_TOKENS):
        ids.append(int(model(torch.tensor([ids], device=device)).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]
