"""A vLLM engine of two CPU workers: are its weights those that were pushed?

`python -m tests.integration.tensor_parallel_probe FOLDER OTHER` prints one line of JSON. FOLDER has a model
and OTHER one with the same shape and other weights. vLLM wants a separate process, with its environment set
before its import.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

BUCKET_BYTES = 100_000


def main(folder: str, other: str) -> None:
    from rayrlhf.config.model import ModelConfig
    from rayrlhf.config.rollout import EngineConfig
    from rayrlhf.rollout.engine_settings import engine_settings

    settings = engine_settings(
        ModelConfig(path=folder, dtype="float32"),
        EngineConfig(kv_cache_bytes=64 * 2**20),
        seed=0,
        max_model_tokens=128,
        weight_store=None,
        on_gpu=False,
        threads=1,
    )
    os.environ.update(settings.env_vars)
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    print(json.dumps(asyncio.run(_probe(folder, other, settings.engine_args | two))), flush=True)
    os._exit(0)  # the stepper's thread waits for more


async def _probe(folder: str, other: str, engine_args: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
    from rayrlhf.rollout.vllm_engine import Stepper
    from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets
    from tests.integration.engine_probe import GREEDY_TOKENS, PROMPTS, _greedy

    stepper = Stepper(engine_args)

    async def sums() -> list[dict[str, int]]:
        return await stepper._on_thread(lambda: stepper._engine.collective_rpc(_sums))

    async def push(path: str, version: int) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        await stepper.pause()
        await stepper.start_weight_update()
        for group in plan_buckets(checkpoint_tensors(model), BUCKET_BYTES):
            slices = lay_out(group)
            await stepper.load_bucket(slices, flatten(group, slices).numpy())
        await stepper.finish_weight_update(version)
        await stepper.resume()

    def by_transformers(path: str) -> list[list[int]]:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        continued = []
        for prompt in PROMPTS:
            ids = list(prompt)
            with torch.no_grad():
                for _ in range(GREEDY_TOKENS):
                    ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            continued.append(ids[len(prompt) :])
        return continued

    loaded, tokens = await sums(), await _greedy(stepper)
    await push(folder, 1)
    found: dict[str, Any] = {
        "workers": len(loaded),
        "tensors": len(loaded[0]),
        "halves differ": loaded[0] != loaded[1],
        "sums after the same": await sums() == loaded,
        "tokens after the same": await _greedy(stepper) == tokens,
        "as transformers": tokens == by_transformers(folder),
    }
    await push(other, 2)
    pushed, pushed_tokens = await sums(), await _greedy(stepper)
    found["others as transformers"] = pushed_tokens == by_transformers(other)
    found["others differ"] = pushed != loaded and pushed_tokens != tokens
    await push(folder, 3)
    found["and back"] = await sums() == loaded and await _greedy(stepper) == tokens
    return found


def _sums(worker: Any) -> dict[str, int]:
    """In a worker: a checksum of every parameter and buffer, and of what layers keep beside them."""
    import torch

    from rayrlhf.weights.checksum import checksum

    model = worker.model_runner.model
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module in model.named_modules():  # such as MLA's W_UK_T and W_UV, made of kv_b_proj
        tensors |= {f"{name}.{key}": each for key, each in vars(module).items() if torch.is_tensor(each)}
    return {
        name: checksum(tensor.detach().contiguous())
        for name, tensor in tensors.items()
        if "kv_cache" not in name and tensor.numel() > 0
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
