"""The planner's bytes beside what torch's allocator counts, for a real model and three made-up shapes.

    make model && .venv/bin/python -m benchmarks.planner

Each shape makes one optimizer step of two micro-batches through rayrlhf's learner (DeepSpeed, one rank, fp32
on the CPU), in a process of its own; the peak is counted as in `benchmarks.update_memory`. The exit status is
1 where a prediction is off by 10 % or more. The formulas were derived from other shapes (hidden 256 or 512, 4
or 8 layers) than these.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.update_memory import ENVIRONMENT, MB, RESULTS, machine

ALLOWED = 0.1
LENGTH = 128  # tokens of a sequence
SMOLLM2 = "models/SmolLM2-135M-Instruct"
LLAMA = {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "wide and shallow, many key-value heads": LLAMA
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 12}
    | {"num_key_value_heads": 12, "vocab_size": 6000, "tie_word_embeddings": False},
    "narrow and deep, one key-value head": LLAMA
    | {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 16, "num_attention_heads": 3}
    | {"num_key_value_heads": 1, "vocab_size": 3000, "tie_word_embeddings": True},
    "Qwen2, large vocabulary": {"model_type": "qwen2", "max_position_embeddings": 512}
    | {"hidden_size": 256, "intermediate_size": 1408, "num_hidden_layers": 5, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 40_000, "tie_word_embeddings": True},
}
CASES = [
    # model or shape, tokens of a micro-batch, ZeRO stage, gradient checkpointing, what is trained
    (SMOLLM2, 1024, 0, False, "all"),
    (SMOLLM2, 2048, 2, True, "all"),
    (SMOLLM2, 2048, 2, True, "LoRA"),
    ("wide and shallow, many key-value heads", 2048, 2, True, "QLoRA"),
    *[
        (name, 2048, stage, checkpointing, trained)
        for name in SHAPES
        for stage, checkpointing, trained in ((0, False, "all"), (2, True, "all"), (2, True, "LoRA"))
    ],
]
RANK = 16  # of adapters


def compare(name: str, tokens: int, stage: int, checkpointing: bool, trained: str) -> dict[str, Any]:
    """Bytes predicted and measured, in this process."""
    import torch
    import torch.distributed as dist

    from rayrlhf.config.train import TrainConfig
    from rayrlhf.placement import memory
    from rayrlhf.placement.shape import shape_of

    torch.set_num_threads(os.cpu_count() or 1)
    train = TrainConfig(
        num_steps=10,
        zero_stage=stage,  # pyright: ignore[reportArgumentType]
        gradient_checkpointing=checkpointing,
        max_tokens_per_micro_batch=tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        measured = _measure(name, train, trained)
        dist.destroy_process_group()
    shape = shape_of(measured.pop("config"), name)
    adapter = memory.Adapter(RANK, quantized=trained == "QLoRA") if trained != "all" else None
    predicted = memory.trainer(
        shape, train, memory.Precision(4, on_gpu=False), num_workers=1, name="actor", adapter=adapter
    )
    parameters = shape.parameters + (adapter.parameters(shape) if adapter else 0)
    state = predicted.only("weights", "optimizer").total
    return {
        "case": [name, tokens, stage, checkpointing, trained],
        "parameters": {"predicted": parameters, "measured": measured["parameters"]},
        "weights and optimizer": {"predicted": state, "measured": measured["before"]},
        "gradients": {"predicted": predicted.device["gradients"], "measured": measured["gradients"]},
        "activations": {
            # Without the layer that is computed again: it is not there yet when the backward pass begins.
            "predicted": predicted.device["activations"]
            - checkpointing
            * tokens
            * memory.layer_activation_bytes(shape, memory.Precision(4, on_gpu=False), adapter),
            "measured": measured["decoder"],
        },
        "peak": {"predicted": predicted.total, "measured": measured["peak"]},
    }


def _measure(name: str, train: Any, trained: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks import update_memory
    from rayrlhf.batch import PackedBatch, cu_seqlens_of, position_ids_of
    from rayrlhf.config.algorithm import AlgorithmConfig
    from rayrlhf.config.model import LoraConfig, TrainedModelConfig
    from rayrlhf.loops.objectives import StepCounts, policy_forward, policy_objective
    from rayrlhf.models.adapters import adapter_weights, weights_of
    from rayrlhf.models.attention import VARLEN_SDPA
    from rayrlhf.models.load import adapt, checkpoint_activations
    from rayrlhf.models.logprobs import PolicyModel
    from rayrlhf.train.learner import Learner, Term

    torch.manual_seed(0)
    values = dict(SHAPES.get(name, {}))
    config = (
        AutoConfig.for_model(values.pop("model_type"), **values)
        if name in SHAPES
        else AutoConfig.from_pretrained(name)
    )
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_SDPA, dtype=torch.float32)
    model = TrainedModelConfig(
        path=name,
        lora=LoraConfig(rank=RANK) if trained != "all" else None,
        quantization="nf4" if trained == "QLoRA" else None,
    )
    adapt(model, causal_lm, device=torch.device("cpu"), seed=0)
    if train.gradient_checkpointing:
        checkpoint_activations(causal_lm)
    module = PolicyModel(causal_lm, chunk_tokens=train.logprob_chunk_tokens)
    module.head.register_forward_pre_hook(update_memory._mark_head)
    learner = Learner(module.train(), train, lr=1e-5, dtype=torch.float32, name="actor")
    lengths = [LENGTH] * (train.max_tokens_per_micro_batch // LENGTH)
    position_ids = position_ids_of(lengths)
    batch = PackedBatch(
        input_ids=torch.randint(config.vocab_size, (sum(lengths),)),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens_of(lengths),
        loss_mask=(position_ids > 0).float(),
        advantages=torch.randn(sum(lengths)),
    )
    batches = [batch, batch]
    loss = policy_objective(
        AlgorithmConfig(), StepCounts.of(batches), kl_coef=0.0, constant_length=float(LENGTH)
    )
    term = Term(batches, policy_forward(1.0), loss)
    learner.update(term, step=0)  # makes the moments
    learner.engine.zero_grad()
    counted = update_memory.allocations(learner, Term([batch], term.forward, term.loss))
    decoder = counted["decoder"]  # of a first micro-batch: no gradients are alive beside it
    counted = update_memory.allocations(learner, term)
    parameters = sum(math.prod(weight.shape) for weight in weights_of(learner.module))
    parameters += sum(parameter.numel() for _, parameter in adapter_weights(learner.module))
    return {
        "config": config.to_dict(),
        "parameters": parameters,
        "before": counted["before"],
        "peak": counted["peak"],
        "gradients": 4 * sum(p.numel() for p in learner.module.parameters() if p.requires_grad),
        "decoder": decoder,
    }


def in_a_process_of_its_own(index: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "numbers.json"
        command = [sys.executable, "-m", "benchmarks.planner", "--case", str(index), "--answer", str(answer)]
        subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, timeout=300)
        return json.loads(answer.read_text())


def off_by(row: dict[str, Any], kind: str) -> float:
    """How far a prediction is off, as a share of what was measured."""
    return row[kind]["predicted"] / row[kind]["measured"] - 1


def as_markdown(rows: list[dict[str, Any]], where: dict[str, Any], passed: bool) -> str:
    kinds = ("weights and optimizer", "gradients", "activations", "peak")
    lines = [
        "# What the planner predicts and what is measured",
        "",
        "One optimizer step of two micro-batches, fp32 on the CPU, one rank; MB predicted / measured.",
        f"Adapters (LoRA, and QLoRA on NF4 weights) have rank {RANK}, on all linear layers.",
        "",
        "| model | parameters | tokens | ZeRO | checkpointing | trained | " + " | ".join(kinds) + " |",
        "|---|---:|---:|---:|---|---|" + "---:|" * len(kinds),
    ]
    for row in rows:
        name, tokens, stage, checkpointing, trained = row["case"]
        cells = [
            f"{row[kind]['predicted'] / MB:.1f} / {row[kind]['measured'] / MB:.1f} ({off_by(row, kind):+.1%})"
            for kind in kinds
        ]
        exact = "" if row["parameters"]["predicted"] == row["parameters"]["measured"] else " (WRONG)"
        lines.append(
            f"| {name} | {row['parameters']['measured']:,}{exact} | {tokens} | {stage} "
            f"| {'yes' if checkpointing else 'no'} | {trained} | " + " | ".join(cells) + " |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines += [
        "",
        f"{'PASS' if passed else 'FAIL'}: predictions {'' if passed else 'NOT '}within {ALLOWED:.0%}.",
        "",
        f"{where['cpu']}, {where['cores']} cores; {versions}. `.venv/bin/python -m benchmarks.planner`",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The planner's bytes beside what is measured.")
    parser.add_argument("--case", type=int, help="measure this one in this process")
    parser.add_argument("--answer", type=Path, help="where --case writes its numbers")
    options = parser.parse_args()
    if options.case is not None:
        options.answer.write_text(json.dumps(compare(*CASES[options.case])))
        return 0
    rows = [in_a_process_of_its_own(index) for index in range(len(CASES))]
    passed = all(
        abs(off_by(row, kind)) < ALLOWED for row in rows for kind in row if kind not in ("case", "parameters")
    ) and all(row["parameters"]["predicted"] == row["parameters"]["measured"] for row in rows)
    where = machine(0) | {"command": ".venv/bin/python -m benchmarks.planner"}
    report = as_markdown(rows, where, passed)
    (RESULTS / "planner.md").write_text(report)
    (RESULTS / "planner.json").write_text(json.dumps(where | {"cases": rows}, indent=2) + "\n")
    print(report)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
