"""One real vLLM engine that gets a trainer's LoRA adapter alone, in one process, without Ray.

`python -m tests.rollout.adapter_probe FOLDER` prints one line of JSON; test_vllm_adapter.py says what it
means. vLLM wants a separate process, with its environment set before its import.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Awaitable
from typing import Any

PROMPT = [1, *range(20, 90)]  # whole blocks in the prefix cache
LORA = {"rank": 4, "alpha": 12.0}  # a scaling of 3
BUCKET_BYTES = 20_000  # several buckets
COUNT = 120  # tokens of the response that is switched in the middle
GREEDY = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True}
WRONG = "model.layers.1.self_attn.k_proj.lora_B.weight"  # in the middle of a fused layer


def main(folder: str) -> None:
    from rayrlhf.config.model import LoraConfig, ModelConfig
    from rayrlhf.config.rollout import EngineConfig
    from rayrlhf.rollout.engine_settings import engine_settings

    model, lora = ModelConfig(path=folder, dtype="float32"), LoraConfig.model_validate(LORA)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = engine_settings(
        model,
        EngineConfig(kv_cache_bytes=64 * 2**20),
        seed=0,
        max_model_tokens=256,
        weight_store=None,
        on_gpu=False,
        threads=1,
        adapter=lora.model_copy(update={"target_modules": modules}),
    )
    os.environ.update(settings.env_vars)
    print(json.dumps(asyncio.run(Probe(folder, model, lora, settings.engine_args).results())), flush=True)
    os._exit(0)  # the stepper's thread waits for more


class Probe:
    def __init__(self, folder: str, model: Any, lora: Any, engine_args: dict[str, Any]) -> None:
        import torch

        from rayrlhf.models.load import load_policy
        from rayrlhf.models.lora import add_adapters
        from rayrlhf.rollout.vllm_engine import Stepper

        self.folder = folder
        self.policy = load_policy(model, folder, device=torch.device("cpu"), chunk_tokens=1000).eval()
        add_adapters(self.policy.causal_lm, lora, seed=0)
        self.stepper = Stepper(engine_args)
        self.engine: Any = self.stepper._engine

    async def results(self) -> dict[str, Any]:
        from tests.integration.engine_probe import _difference

        results: dict[str, Any] = {"differences": [await _difference(self.policy, self.stepper)], "stale": []}
        for version in (1, 2):
            self.train(version)
            results["stale"].append(await _difference(self.policy, self.stepper))
            await self.push(version)
            results["differences"].append(await _difference(self.policy, self.stepper))
            results[f"greedy {version}"] = [await self.generate(24), self.expected(PROMPT, 24)]
        results["ids"] = sorted(self.engine.list_loras())
        results["in memory"] = self.num_adapters_in_memory()
        results["switched"] = await self.switched()
        results |= await self.refused()
        await self.push(5)
        results["recovered"] = await _difference(self.policy, self.stepper)
        await self.push_other_base()
        await self.push(6)
        results["on another base"] = await _difference(self.policy, self.stepper)
        results["in memory at the end"] = self.num_adapters_in_memory()
        return results

    def train(self, seed: int) -> None:
        import torch

        from rayrlhf.models.adapters import adapter_weights

        torch.manual_seed(seed)
        with torch.no_grad():
            for _, parameter in adapter_weights(self.policy.causal_lm):
                parameter.add_(0.05 * torch.randn_like(parameter))

    async def push(self, version: int, *, renamed: tuple[str, str] = ("", ""), flip: str = "") -> None:
        """`renamed`: a part of the tensors' names; `flip`: a tensor that is changed on its way."""
        import torch

        from rayrlhf.models.adapters import adapter_matrices
        from rayrlhf.weights.buckets import GatheredTensor, flatten, lay_out, plan_buckets
        from rayrlhf.weights.checksum import checksum
        from rayrlhf.weights.store import AdapterSpec

        tensors = [
            GatheredTensor(matrix.name.replace(*renamed), matrix.scaled(torch.float32))
            for matrix in adapter_matrices(self.policy.causal_lm)
        ]
        spec = AdapterSpec(4, {each.name: checksum(each.tensor) for each in tensors})
        for each in tensors:
            if each.name == flip:
                each.tensor[0, 0] += 1e-6
        stepper = self.stepper
        await stepper.pause()
        await stepper.start_adapter_update()
        for group in plan_buckets(tensors, BUCKET_BYTES):
            slices = lay_out(group)
            flat = flatten(group, slices).numpy()
            await stepper.load_adapter_bucket(slices, flat)
            flat[:] = 255  # the next bucket reuses the memory
        await stepper.finish_adapter_update(version, spec)
        await stepper.resume()

    async def push_other_base(self) -> None:
        """All weights of the base, which are not the checkpoint's."""
        import torch

        from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
        from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets

        with torch.no_grad():
            for name, parameter in self.policy.causal_lm.named_parameters():
                if "lora_" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std())
        await self.stepper.pause()
        await self.stepper.start_weight_update()
        for group in plan_buckets(checkpoint_tensors(self.policy.causal_lm, adapters=False), BUCKET_BYTES):
            slices = lay_out(group)
            await self.stepper.load_bucket(slices, flatten(group, slices).numpy())
        await self.stepper.finish_weight_update(5)

    async def generate(self, count: int) -> list[int]:
        params = GREEDY | {"max_tokens": count}
        [output] = [output async for _, output in self.stepper.stream(PROMPT, [params])]
        return list(output.outputs[0].token_ids)

    def expected(self, after: list[int], count: int) -> list[int]:
        """Greedy continuation by transformers, with the merged weights that a push of all would send."""
        import torch
        from transformers import AutoModelForCausalLM

        from rayrlhf.models.checkpoint_tensors import checkpoint_tensors

        merged = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        state = {
            spec.name: tensor
            for tensors in checkpoint_tensors(self.policy.causal_lm)
            for spec, tensor in zip(tensors.specs, tensors.tensors(), strict=True)
        }
        merged.load_state_dict(state, strict=False)
        merged.tie_weights()
        ids = list(after)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(merged(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(after) :]

    async def switched(self) -> dict[str, Any]:
        """A push in the middle of a response, and another one right after it."""
        from rayrlhf.rollout.engine import _generation
        from rayrlhf.rollout.vllm_adapter import scheduled_requests

        first = self.expected(PROMPT, COUNT)

        async def respond() -> Any:
            params = GREEDY | {"max_tokens": COUNT, "seed": 7}
            [output] = [output async for _, output in self.stepper.stream(PROMPT, [params])]
            return _generation(output)

        response = asyncio.create_task(respond())
        await asyncio.sleep(0)
        while not (requests := list(scheduled_requests(self.engine))) or requests[0].num_output_tokens < 20:
            await asyncio.sleep(0.001)
        await self.stepper.pause()
        [request] = scheduled_requests(self.engine)
        hashes = list(request.block_hashes)
        self.train(3)
        await self.push(3)
        changed = [old != new for old, new in zip(hashes, request.block_hashes, strict=False)]
        generation = await response
        kept = generation.policy_versions.count(2)
        return {
            "versions": generation.policy_versions,
            "tokens": generation.token_ids,
            "first": first[:kept],
            "second": self.expected(PROMPT + generation.token_ids[:kept], COUNT - kept),
            "block hashes changed": changed,
        }

    async def refused(self) -> dict[str, str]:
        refused = {
            "no layer": await _error(self.push(4, renamed=("k_proj", "z_proj"))),
            "changed on its way": await _error(self.push(4, flip=WRONG)),
        }
        layer = self.engine.collective_rpc(_layers)[0]["model.layers.1.self_attn.qkv_proj"]
        set_lora = layer.set_lora

        def wrongly(index: int, a: list[Any], b: list[Any]) -> None:
            set_lora(index, a, [b[0], b[1] * 1.001, b[2]])

        layer.set_lora = wrongly
        refused["held wrongly"] = await _error(self.push(4))
        layer.set_lora = set_lora
        return refused

    def num_adapters_in_memory(self) -> int:
        from vllm.lora.lora_model import LoRAModel

        gc.collect()
        return sum(isinstance(each, LoRAModel) for each in gc.get_objects())


def _layers(worker: Any) -> dict[str, Any]:
    return worker.model_runner.lora_manager._adapter_manager.modules


async def _error(push: Awaitable[None]) -> str:
    try:
        await push
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
