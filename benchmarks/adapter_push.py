"""A push of LoRA adapters alone beside one of merged weights: bytes, seconds, how much of the update arrives.

    make model && .venv/bin/python -m benchmarks.adapter_push

SmolLM2-135M in bf16 with adapters of rank 16 on all linear layers, A as initialised and B of normal values
times |B|. Each way of pushing has a real vLLM engine in a process of its own, which scores 16 sequences of
128 tokens with the base and after each push. The reference is the trainer's model in fp32 with the same bf16
values of W, A and B. Of the changes of the log-probabilities that the update makes, d, the table has

  error   |d - d_reference| / |d_reference| over all tokens: 1 if the update is lost, more if it drowns in
          bf16's rounding
  arrives (d · d_reference) / |d_reference|^2: the share of the update that arrives, whose noise averages out

The third row of each |B| is the trainer itself in bf16, which adds the adapter's output to the layer's. Bytes
are those of the buckets. Seconds are the median of three pushes: packing buckets on the trainer and loading
them in the paused engine, without transport.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.update_memory import MB, RESULTS, machine
from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import LoraConfig, ModelConfig
from rayrlhf.config.rollout import EngineConfig
from rayrlhf.models.adapters import adapter_matrices, adapter_weights
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.models.load import load_policy, load_tokenizer
from rayrlhf.models.lora import add_adapters
from rayrlhf.rollout.engine_settings import engine_settings
from rayrlhf.weights.buckets import GatheredTensor, flatten, lay_out, plan_buckets
from rayrlhf.weights.checksum import checksum
from rayrlhf.weights.store import AdapterSpec

MODEL = "models/SmolLM2-135M-Instruct"
TEXT = Path(__file__).parent.parent / "CONTRIBUTING.md"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(rank=16, alpha=32, target_modules=MODULES)
SIZES = (1e-5, 1e-4, 1e-3, 1e-2)  # |B|
NUM_SEQUENCES, LENGTH = 16, 128
NUM_PUSHES = 3
BUCKET_BYTES = 134_217_728  # the default of rollout.weight_sync.bucket_bytes
WAYS = ("merged", "adapter", "trainer", "reference")
SCORE = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


class Trainer:
    """The trainer's model with adapters, in bf16 or, for the reference, in fp32 with bf16's values."""

    def __init__(self, *, dtype: torch.dtype) -> None:
        name: Any = str(dtype).removeprefix("torch.")
        config = ModelConfig(path=MODEL, dtype=name)
        self.policy = load_policy(config, MODEL, device=torch.device("cpu"), chunk_tokens=512).eval()
        add_adapters(self.policy.causal_lm, LORA, seed=0)
        for _, parameter in adapter_weights(self.policy.causal_lm):
            parameter.data = parameter.data.to(torch.bfloat16).to(dtype)

    def set_size(self, size: float) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter_weights(self.policy.causal_lm):
                if "lora_B" in name:
                    values = torch.randn(parameter.shape, generator=generator) * size
                    parameter.copy_(values.to(torch.bfloat16))

    @torch.no_grad()
    def logprobs(self, sequences: list[list[int]]) -> Tensor:
        lengths = [len(sequence) for sequence in sequences]
        positions = position_ids_of(lengths)
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        return self.policy(ids, positions, cu_seqlens_of(lengths), (positions > 0).float(), 1.0).logprobs


class Engine:
    def __init__(self, way: str) -> None:
        settings = engine_settings(
            ModelConfig(path=MODEL, dtype="bfloat16"),
            EngineConfig(kv_cache_bytes=256 * 2**20),
            seed=0,
            max_model_tokens=2 * LENGTH,
            weight_store=None,
            on_gpu=False,
            threads=os.cpu_count() or 1,
            adapter=LORA if way == "adapter" else None,
        )
        os.environ.update(settings.env_vars)
        from rayrlhf.rollout.vllm_engine import Stepper

        self.way = way
        self.stepper = Stepper(settings.engine_args)
        self.pushes = 0

    async def push(self, trainer: Trainer) -> tuple[int, float]:
        """(bytes, seconds)"""
        self.pushes += 1
        started = time.perf_counter()
        stepper, model = self.stepper, trainer.policy.causal_lm
        await stepper.pause()
        if self.way == "merged":
            await stepper.start_weight_update()
            num_bytes = await self._load(checkpoint_tensors(model), stepper.load_bucket)
            await stepper.finish_weight_update(self.pushes)
        else:
            matrices = adapter_matrices(model)
            tensors = [GatheredTensor(each.name, each.scaled(torch.bfloat16)) for each in matrices]
            spec = AdapterSpec(LORA.rank, {each.name: checksum(each.tensor) for each in tensors})
            await stepper.start_adapter_update()
            num_bytes = await self._load(tensors, stepper.load_adapter_bucket)
            await stepper.finish_adapter_update(self.pushes, spec)
        await stepper.resume()
        return num_bytes, time.perf_counter() - started

    async def _load(self, tensors: Any, load: Any) -> int:
        num_bytes = 0
        for group in plan_buckets(tensors, BUCKET_BYTES):
            slices = lay_out(group)
            flat = flatten(group, slices).numpy()
            num_bytes += flat.nbytes
            await load(slices, flat)
        return num_bytes

    async def logprobs(self, sequences: list[list[int]]) -> Tensor:
        scored = await asyncio.gather(*map(self._score, sequences))
        return torch.tensor([logprob for sequence in scored for logprob in sequence])

    async def _score(self, ids: list[int]) -> list[float]:
        [output] = [output async for _, output in self.stepper.stream(ids, [SCORE])]
        found: Any = output.prompt_logprobs
        return [0.0, *(at[token].logprob for at, token in zip(found[1:], ids[1:], strict=True))]


def read_sequences() -> list[list[int]]:
    ids = load_tokenizer(MODEL)(TEXT.read_text("utf-8")).input_ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(NUM_SEQUENCES)]


async def measure(way: str) -> dict[str, Any]:
    """Log-probabilities with the base and with each |B|; bytes and seconds of the pushes to an engine."""
    sequences = read_sequences()
    trainer = Trainer(dtype=torch.float32 if way == "reference" else torch.bfloat16)
    if way in ("trainer", "reference"):
        logprobs = {0.0: trainer.logprobs(sequences)}
        for size in SIZES:
            trainer.set_size(size)
            logprobs[size] = trainer.logprobs(sequences)
        return {"logprobs": [logprobs[size].tolist() for size in (0.0, *SIZES)]}
    engine = Engine(way)
    found = [await engine.logprobs(sequences)]
    pushes: list[tuple[int, float]] = []
    for size in SIZES:
        trainer.set_size(size)
        pushes = [await engine.push(trainer) for _ in range(NUM_PUSHES)]
        found.append(await engine.logprobs(sequences))
    seconds = statistics.median(seconds for _, seconds in pushes)
    return {"logprobs": [each.tolist() for each in found], "bytes": pushes[-1][0], "seconds": seconds}


def in_a_process_of_its_own(way: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "benchmarks.adapter_push", "--way", way, "--answer", str(answer)]
        subprocess.run(command, check=True)
        return json.loads(answer.read_text())


def compare(answers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    logprobs = {way: torch.tensor(answer["logprobs"]).double() for way, answer in answers.items()}
    changes = {way: each[1:] - each[:1] for way, each in logprobs.items()}  # [sizes, T]
    rows: list[dict[str, Any]] = []
    for index, size in enumerate(SIZES):
        wanted = changes["reference"][index]
        for way in WAYS[:-1]:
            got = changes[way][index]
            difference = logprobs[way][index + 1] - logprobs["trainer"][index + 1]
            rows.append(
                {
                    "size": size,
                    "way": way,
                    "update_nats": float(wanted.square().mean().sqrt()),
                    "error": float((got - wanted).norm() / wanted.norm()),
                    "arrives": float(got @ wanted / wanted.square().sum()),
                    "from_trainer_nats": float(difference.abs().mean()),
                }
            )
    return rows


def findings(answers: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """What is gained, and that precision is not, with the numbers."""
    merged, adapter = answers["merged"], answers["adapter"]
    errors = {(row["way"], row["size"]): row["error"] for row in rows}
    ratios = [errors["adapter", size] / errors["merged", size] for way, size in errors if way == "adapter"]
    return (
        f"A push of adapters alone has {adapter['bytes'] / merged['bytes']:.1%} of the bytes and takes "
        f"{adapter['seconds'] / merged['seconds']:.0%} of the time. In bf16 it gains no precision: its error "
        f"in the log-probabilities is {min(ratios):.2f} to {max(ratios):.2f} times that of merged weights."
    )


def as_markdown(answers: dict[str, dict[str, Any]], rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    names = {"merged": "merged weights", "adapter": "adapters alone", "trainer": "(the trainer in bf16)"}
    lines = [
        "# A push of LoRA adapters alone",
        "",
        f"SmolLM2-135M-Instruct, bf16, rank {LORA.rank} on all linear layers; an engine on the CPU.",
        "",
        "| push | MB | seconds |",
        "|---|---:|---:|",
        *(
            f"| {names[way]} | {answers[way]['bytes'] / MB:.1f} | {answers[way]['seconds']:.3f} |"
            for way in ("merged", "adapter")
        ),
        "",
        f"Changes of the log-probabilities of {NUM_SEQUENCES * (LENGTH - 1):,} tokens:",
        "",
        "| \\|B\\| | rms change in fp32, nats | pushed | error | arrives | mean distance from the trainer |",
        "|---:|---:|---|---:|---:|---:|",
        *(
            f"| {row['size']:g} | {row['update_nats']:.2g} | {names[row['way']]} | {row['error']:.2f} "
            f"| {row['arrives']:.0%} | {row['from_trainer_nats']:.2g} |"
            for row in rows
        ),
        "",
        findings(answers, rows),
        "",
        "bf16's rounding alone moves these log-probabilities: the last column shows by how much. Where the "
        "update changes them by less, no push can be distinguished from another, nor from the trainer. "
        "What the columns are stands in `benchmarks/adapter_push.py`.",
        "",
        f"{where['cpu']}, {where['cores']} cores, load average {where['load_average']}; "
        f"torch {where['versions']['torch']}. `{where['command']}`",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Pushes of LoRA adapters alone and merged.")
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process")
    parser.add_argument("--answer", type=Path, help="where --way writes its numbers")
    options = parser.parse_args()
    if options.way:
        options.answer.write_text(json.dumps(asyncio.run(measure(options.way))))
        os._exit(0)  # the engine's thread waits for more
    answers = {way: in_a_process_of_its_own(way) for way in WAYS}
    rows = compare(answers)
    where = machine(0) | {"command": ".venv/bin/python -m benchmarks.adapter_push"}
    pushes = {way: {key: answers[way][key] for key in ("bytes", "seconds")} for way in ("merged", "adapter")}
    report = as_markdown(answers, rows, where)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "adapter_push.md").write_text(report)
    result = where | {"pushes": pushes, "rows": rows}
    (RESULTS / "adapter_push.json").write_text(json.dumps(result, indent=2) + "\n")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
