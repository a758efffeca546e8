"""Supervised fine-tuning: packed on both sides, each side's default, and adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers import workloads
from benchmarks.peers.cases.case import (
    CONTROL,
    OURS,
    TRL,
    Case,
    Measured,
    Setting,
    both_precisions,
    from_steps,
    run_job,
    run_script,
)

LENGTH = 1024  # tokens of a packed row
SAMPLES_PER_STEP = 8  # TRL's default batch; of about 128 tokens
MICRO_BATCH_TOKENS = 2048  # all of a step's conversations
MEAN_WORDS = 90
NUM_ROWS = 400
LORA_RANK = 16
OURS_FP32 = "ours, fp32"


def data(setting: Setting) -> Path:
    path = setting.folder / "conversations.jsonl"
    return workloads.write(workloads.conversations(NUM_ROWS, mean_words=MEAN_WORDS), path)


def ours(setting: Setting, name: str, *, lora: bool = False, dtype: str = "auto") -> Measured:
    model: dict[str, Any] = {"path": str(setting.model), "dtype": dtype}
    if lora:
        model["lora"] = {"rank": LORA_RANK, "alpha": 2 * LORA_RANK}
    config = {
        "job": "sft",
        "model": model,
        "data": {"train": f"jsonl@{data(setting)}", "max_tokens": LENGTH, "learn": "all"},
        "train": {
            "num_steps": setting.num_steps,
            "samples_per_step": SAMPLES_PER_STEP,
            "lr": 1e-4 if lora else 1e-5,
            "zero_stage": 0,
            "max_tokens_per_micro_batch": MICRO_BATCH_TOKENS,
            "num_threads": setting.threads,
        },
        "checkpoint": {"export": False, "every_steps": None},
    }
    return from_steps(*run_job(setting, name, "sft", config), parts=["time/update", "data/fill"])


def trl(setting: Setting, name: str, *, packing: bool, lora: bool = False, bf16: bool = False) -> Measured:
    options = {
        "data": data(setting),
        "packing": int(packing),
        "batch": 1 if packing else SAMPLES_PER_STEP,
        "accumulate": 1,
        "length": LENGTH,
        "lora": LORA_RANK if lora else 0,
    }
    return run_script(setting, name, "sft", options, bf16=bf16)


def control(setting: Setting, name: str) -> Measured:
    return run_script(setting, name, "control", {"data": data(setting), "accumulate": 1, "length": LENGTH})


SHARED = (
    "Conversations of log-normal lengths, loss on all tokens, about 1,024 real tokens per optimizer "
    "step in one pass, AdamW, clipping at 1.0, no checkpointing of activations."
)
CASES = [
    Case(
        name="sft-packed",
        title="SFT, packed on both sides",
        unit="real tokens/s",
        higher_is_better=True,
        sides={
            OURS: ours,
            **both_precisions(TRL, partial(trl, packing=True)),
            CONTROL: control,
            OURS_FP32: partial(ours, dtype="float32"),
        },
        peer=TRL,
        compared=SHARED,
        differs="TRL packs the whole data set beforehand (best-fit decreasing, its default) into rows "
        "of 1,024 tokens, one per step; it attends through a dense block-diagonal mask, as there is no "
        "FlashAttention on a CPU (what one sequence sees of another is in the JSON: packing_error). "
        "Ours packs each step's 8 conversations into one pass. TRL also computes entropy and token "
        "accuracy. The control's blocks are full and attend over the whole block.",
        trains_all_weights=True,
    ),
    Case(
        name="sft-default",
        title="SFT, each with its default batches",
        unit="real tokens/s",
        higher_is_better=True,
        sides={OURS: ours, **both_precisions(TRL, partial(trl, packing=False))},
        peer=TRL,
        compared=SHARED + " 8 conversations per step on both sides.",
        differs="TRL pads 8 conversations to the longest; ours packs.",
        trains_all_weights=True,
    ),
    Case(
        name="lora-sft",
        title="SFT of LoRA adapters (rank 16, all linear layers), packed on both sides",
        unit="real tokens/s",
        higher_is_better=True,
        sides={
            OURS: partial(ours, lora=True),
            **both_precisions(TRL, partial(trl, packing=True, lora=True)),
        },
        peer=TRL,
        compared=SHARED,
        differs="As for sft-packed; TRL's adapters are PEFT's.",
    ),
]
