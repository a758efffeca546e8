"""What only a GPU can show: `make gpu-check`. Without one it says so and exits 0.

    .venv/bin/python -m benchmarks.gpu_check [--device cpu] [--only NAME ...]

Every check is a process of its own with a deadline; a package that is missing is told, not a failure. The
order goes from kernels to a whole run: log-probabilities against float64, packed attention, an update of a
1B-shaped model (tokens per second, share of the GPU's peak), offloading between updates, buckets that
another process reads in place, an engine that sleeps and wakes with pushed weights, and a PPO run in which
engines and trainers take turns. Results go to benchmarks/results/gpu_check.json with the device's name.
`--device cpu` runs the same checks, small, on the CPU: that is how this file itself is tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SECONDS = 300.0
BUCKETS = 5
BF16_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense, from the maker's data sheets


@dataclass(frozen=True)
class Check:
    run: Callable[[str], dict[str, Any]]
    needs: tuple[str, ...]  # packages beside torch and transformers


def fused_head(device: str) -> dict[str, Any]:
    """Log-probabilities of the chunked head in fp32 and bf16 weights against float64."""
    import torch

    from rayrlhf.models.fused_head import FusedLogprobs, LogitScaling

    torch.manual_seed(0)
    errors: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(1000, 512, device=device, dtype=dtype)
        weight = (torch.randn(8192, 512, device=device) * 0.05).to(dtype)
        targets = torch.randint(8192, (1000,), device=device)
        got, _ = FusedLogprobs.apply(hidden, weight, None, targets, LogitScaling(1.0, None), 256)
        exact = (hidden.double() @ weight.double().T).log_softmax(-1)
        wanted = exact.gather(1, targets[:, None]).squeeze(1)
        errors[str(dtype).removeprefix("torch.")] = float((got.double() - wanted).abs().max())
    assert errors["float32"] < 1e-3, errors
    return {"max_error": errors}


def packed_attention(device: str) -> dict[str, Any]:
    """A packed stream gives each sequence what it gets alone, by every kernel that is there."""
    import torch
    from transformers import AutoModelForCausalLM

    from rayrlhf.batch import cu_seqlens_of, position_ids_of
    from rayrlhf.models.attention import attention_implementation, packed_inputs

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kernels = {"sdpa": attention_implementation("sdpa", torch.device(device))}
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        kernels["flash_attention_2"] = "flash_attention_2"
    lengths = [70, 1, 200, 33]
    ids = torch.randint(1000, (sum(lengths),), device=device)
    cu_seqlens = cu_seqlens_of(lengths).to(device)
    positions = position_ids_of(lengths).to(device)
    errors: dict[str, float] = {}
    for name, kernel in kernels.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_llama(4, 256), attn_implementation=kernel, dtype=dtype)
        model = model.to(device).eval()
        with torch.no_grad():
            together = model(**packed_inputs(ids, positions, cu_seqlens)).logits[0].float()
            start = 0
            worst = 0.0
            for length in lengths:
                part = slice(start, start + length)
                alone_ends = torch.tensor([0, length], dtype=torch.int32, device=device)
                alone = model(**packed_inputs(ids[part], positions[part], alone_ends)).logits[0].float()
                worst = max(worst, float((together[part] - alone).abs().max()))
                start += length
        errors[name] = worst
    assert max(errors.values()) < (0.1 if device == "cuda" else 1e-4), errors
    return {"max_difference": errors}


def update(device: str) -> dict[str, Any]:
    """Tokens per second of the learner; offloading between updates changes no loss."""
    import torch
    import torch.distributed as dist

    from rayrlhf.config.train import TrainConfig
    from rayrlhf.models.load import checkpoint_activations
    from rayrlhf.train import process_group
    from rayrlhf.train.learner import Learner

    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layers, hidden, tokens = (16, 2048, 16_384) if on_gpu else (2, 128, 512)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = process_group.ON_GPUS if on_gpu else process_group.ON_CPUS
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        for stage in (2, 3):
            losses: dict[bool, list[float]] = {}
            for offloading in (False, True):
                torch.manual_seed(0)
                module = _policy(layers, hidden, dtype, device)
                checkpoint_activations(module.causal_lm)
                train = TrainConfig(num_steps=10, zero_stage=stage)  # pyright: ignore[reportArgumentType]
                learner = Learner(module, train, lr=1e-5, dtype=dtype, name="actor")
                term = _term(tokens, device)
                losses[offloading] = []
                started = 0.0
                for step in range(4):
                    if step == 1:
                        _synchronize(device)
                        started = time.perf_counter()
                    losses[offloading].append(learner.update(term, step=step).results()["loss/actor"])
                    if offloading:
                        results[f"zero{stage}_offloaded_bytes"] = learner.offload()
                        learner.reload()
                _synchronize(device)
                if not offloading:
                    count = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
                    seconds = (time.perf_counter() - started) / 3
                    results[f"zero{stage}_tokens_per_second"] = round(tokens / seconds)
                    results[f"zero{stage}_tflops"] = round(8 * count * tokens / seconds / 1e12, 2)
                learner.engine.destroy()
                del learner, module
                if on_gpu:
                    torch.cuda.empty_cache()
            # On a GPU the backward pass of attention adds in any order.
            for kept, offloaded in zip(losses[False], losses[True], strict=True):
                bound = 1e-3 * abs(kept) if on_gpu else 0.0
                assert abs(kept - offloaded) <= bound, (stage, losses)
        dist.destroy_process_group()
    if on_gpu:
        name = torch.cuda.get_device_name()
        peak = next((peak for key, peak in BF16_PEAK_TFLOPS.items() if key in name), None)
        if peak is not None:
            results["zero2_share_of_peak"] = round(results["zero2_tflops"] / peak, 3)
    return results


def links(device: str) -> dict[str, Any]:
    """Buckets that another process reads in place (CUDA IPC), and NCCL's start with a single member."""
    import torch
    import torch.multiprocessing

    from rayrlhf.weights.transfer_group import Receiver, TransferGroup, join
    from rayrlhf.weights.transfer_store import TransferStore

    num_bytes = (256 if device == "cuda" else 16) * 2**20
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    store = TransferStore()
    transfer_group = TransferGroup("ipc", store.address, {0: Receiver(0, ("here",))}, 60)
    context = torch.multiprocessing.get_context("spawn")
    sums = context.Queue()
    reader = context.Process(target=_read_buckets, args=(transfer_group, where, num_bytes, sums), daemon=True)
    reader.start()
    assert sums.get(timeout=SECONDS) == "ready"
    link = join(transfer_group, rank=0, device=where, key="here")
    wanted: list[int] = []
    seconds: list[float] = []
    for _ in range(BUCKETS):
        flat = link.buffer(num_bytes)
        flat.random_(256)
        wanted.append(int(flat.sum(dtype=torch.int64)))
        started = time.perf_counter()
        link.send(flat)
        link.flush()
        seconds.append(time.perf_counter() - started)
    got = [sums.get(timeout=SECONDS) for _ in range(BUCKETS)]
    reader.join(SECONDS)
    link.end("done")
    store.close()
    assert got == wanted, (got, wanted)
    results: dict[str, Any] = {"gigabytes_per_second": round(num_bytes / min(seconds) / 1e9, 1)}
    if device == "cuda":
        alone = TransferStore()
        nobody = TransferGroup("nccl", alone.address, {}, 60)
        group = join(nobody, rank=0, device=where, key="")
        group.send(torch.ones(8, dtype=torch.uint8, device=where))
        group.flush()
        group.end("done")
        alone.close()
        results["nccl"] = "a group of one broadcast"
    return results


def _read_buckets(transfer_group: Any, device: Any, num_bytes: int, sums: Any) -> None:
    """In another process: copy each bucket, as an engine does, and tell the sum of its bytes."""
    import torch

    from rayrlhf.weights.transfer_group import join

    own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    link = join(transfer_group, rank=1, device=device, key="here")
    sums.put("ready")
    for _ in range(BUCKETS):
        own.copy_(link.receive(num_bytes))
        link.release()
        sums.put(int(own.sum(dtype=torch.int64)))


def engine(device: str) -> dict[str, Any]:
    """vLLM: greedy tokens equal transformers', before a sleep and after it, with pushed weights."""
    import asyncio

    import torch
    from transformers import AutoModelForCausalLM

    from rayrlhf.config.model import ModelConfig
    from rayrlhf.config.rollout import RolloutConfig
    from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
    from rayrlhf.rollout.engine_settings import engine_settings
    from rayrlhf.weights.buckets import flatten, lay_out, plan_buckets
    from tests.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(folder)
        settings = engine_settings(
            ModelConfig(path=path, dtype="float32"),
            RolloutConfig(kv_cache_bytes=64 * 2**20, gpu_memory_utilization=0.3),
            seed=0,
            max_model_tokens=128,
            weight_store=None,
            on_gpu=device == "cuda",
            threads=1,
            sleeps=True,
        )
        os.environ.update(settings.env_vars)
        from rayrlhf.rollout.vllm_engine import Stepper

        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.to(device).eval()
        prompt, count = list(range(20, 60)), 16

        def greedy() -> list[int]:
            ids = list(prompt)
            with torch.no_grad():
                for _ in range(count):
                    ids.append(int(model(torch.tensor([ids], device=device)).logits[0, -1].argmax()))
            return ids[len(prompt) :]

        async def body() -> dict[str, Any]:
            stepper = Stepper(settings.engine_args)
            params = {"max_tokens": count, "temperature": 0.0, "ignore_eos": True}

            async def generated() -> list[int]:
                [(_, output)] = [item async for item in stepper.stream(prompt, [params])]
                return list(output.outputs[0].token_ids)

            async def push() -> None:
                await stepper.start_weight_update()
                for group in plan_buckets(checkpoint_tensors(model), 100_000):
                    slices = lay_out(group)
                    await stepper.load_bucket(slices, flatten(group, slices).numpy())
                await stepper.finish_weight_update(1)

            assert await generated() == greedy()
            freed = await stepper.release_memory()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.5)
            await stepper.reacquire_memory("weights")
            await push()
            await stepper.reacquire_memory("kv_cache")
            await stepper.resume()
            assert await generated() == greedy()
            return {"freed_bytes": freed}

        return asyncio.run(body())


def ppo(device: str) -> dict[str, Any]:
    """A PPO run of a tiny model: Ray, Serve, vLLM and DeepSpeed, engines and trainers by turns."""
    from rayrlhf.config.parse import dump_resolved
    from tests.integration.policy_runs import tiny_run
    from tests.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        on_gpu = device == "cuda"
        config = tiny_run(
            Path(folder),
            model,
            train={"num_steps": 3, "zero_stage": 2},
            rollout={"gpu_memory_utilization": 0.3, "sleep": True},
            placement={"preset": "colocate_all", "gpus_per_slot": 1 if on_gpu else 0},
        )
        path = Path(folder) / "config.yaml"
        path.write_text(dump_resolved(config))
        started = time.perf_counter()
        subprocess.run([sys.executable, "jobs/ppo.py", str(path)], check=True, timeout=SECONDS)
        seconds = time.perf_counter() - started
        steps = json.loads((Path(config.run.path) / "summary.json").read_text())["steps"]
        lines = (Path(config.run.path) / "turns.jsonl").read_text().splitlines()
        events = [json.loads(line)["what"] for line in lines]
    # In every step engines sleep, and wake with its weights; on a GPU they also sleep while models load.
    for what in ("optimizer and gradients reloaded", "awake: weights", "awake: kv_cache"):
        assert events.count(what) >= 3, events
    assert steps == 3 and all(f"loaded version {version}" in events for version in (1, 2, 3)), events
    return {"steps": steps, "seconds": round(seconds, 1)}


CHECKS = {
    "fused_head": Check(fused_head, ()),
    "packed_attention": Check(packed_attention, ()),
    "update": Check(update, ("deepspeed",)),
    "links": Check(links, ()),
    "engine": Check(engine, ("vllm", "ray")),
    "ppo": Check(ppo, ("vllm", "ray", "deepspeed")),
}


def _llama(layers: int, hidden: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000 if hidden > 1000 else 1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        tie_word_embeddings=True,
    )


def _policy(layers: int, hidden: int, dtype: Any, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from rayrlhf.models.attention import attention_implementation
    from rayrlhf.models.logprobs import PolicyModel

    kernel = attention_implementation("auto", torch.device(device))
    causal_lm = AutoModelForCausalLM.from_config(
        _llama(layers, hidden), attn_implementation=kernel, dtype=dtype
    )
    return PolicyModel(causal_lm.to(device), chunk_tokens=256).train()


def _term(tokens: int, device: str) -> Any:
    import torch

    from rayrlhf.batch import PolicyBatch, cu_seqlens_of, position_ids_of
    from rayrlhf.config.algorithm import AlgorithmConfig
    from rayrlhf.policy.losses import PolicyObjective, loss_counts, policy_forward
    from rayrlhf.train.collectives import Ranks
    from rayrlhf.train.learner import Term

    generator = torch.Generator().manual_seed(1)
    lengths = [256] * (tokens // 256)
    positions = position_ids_of(lengths)
    batch = PolicyBatch(
        input_ids=torch.randint(1000, (tokens,), generator=generator),
        position_ids=positions,
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=(positions > 0).float(),
        scores=torch.zeros(len(lengths)),
        group_ids=torch.arange(len(lengths)),
        group_advantages=torch.zeros(len(lengths)),
        rollout_logprobs=torch.zeros(tokens),
        advantages=torch.randn(tokens, generator=generator),
    ).to(device)
    counts = loss_counts([batch], Ranks())
    loss = PolicyObjective(AlgorithmConfig(), counts, kl_coef=0.0, constant_length=256.0)
    return Term([batch], policy_forward(1.0), loss)


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def in_a_process_of_its_own(name: str, device: str) -> dict[str, Any]:
    """What the check measured, or why it did not run to its end."""
    missing = [package for package in CHECKS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"status": "not run", "why": f"not installed: {', '.join(missing)}"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", device, "--check", name]
        try:
            done = subprocess.run(
                [*command, "--answer", str(answer)], capture_output=True, text=True, timeout=SECONDS + 60
            )
        except subprocess.TimeoutExpired:
            return {"status": "failed", "why": f"not done within {SECONDS + 60:g} s"}
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            return {"status": "failed", "why": last}
        return {"status": "ran", **json.loads(answer.read_text())}


def main() -> int:
    parser = argparse.ArgumentParser(description="What only a GPU can show.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--check", choices=CHECKS, help="run this one in this process")
    parser.add_argument("--answer", type=Path, help="where --check writes")
    options = parser.parse_args()
    if options.check:
        options.answer.write_text(json.dumps(CHECKS[options.check].run(options.device)))
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here: none of the CUDA paths was run.")
        return 0
    named = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{named}, torch {torch.__version__}")
    results: dict[str, Any] = {}
    for name in options.only:
        results[name] = in_a_process_of_its_own(name, options.device)
        told = ", ".join(f"{key}={value}" for key, value in results[name].items() if key != "status")
        print(f"{results[name]['status']:<8} {name:<18} {told}", flush=True)
    if options.device == "cuda":
        report = {"device": named, "torch": torch.__version__, "checks": results}
        (RESULTS / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    return 1 if any(each["status"] == "failed" for each in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
