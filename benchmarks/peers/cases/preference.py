"""Training on pairs: DPO with its reference computed in each step or beforehand, and reward models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers import workloads
from benchmarks.peers.cases.case import (
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

PAIRS_PER_STEP = 8  # TRL's default batch
MEAN_WORDS = 40
NUM_ROWS = 64
MAX_TOKENS = 512
MICRO_BATCH_TOKENS = 2048  # about what a batch of TRL's holds with its padding


def data(setting: Setting) -> Path:
    path = setting.folder / "pairs.jsonl"
    return workloads.write(workloads.preferences(NUM_ROWS, mean_words=MEAN_WORDS), path)


def ours(setting: Setting, name: str, *, job: str, precompute: bool = False) -> Measured:
    config: dict[str, Any] = {
        "job": job,
        "model": {"path": str(setting.model)},
        "data": {"train": f"jsonl@{data(setting)}", "max_tokens": MAX_TOKENS},
        "train": {
            "num_steps": setting.num_steps,
            "samples_per_step": PAIRS_PER_STEP,
            "lr": 1e-5,
            "zero_stage": 0,
            "max_tokens_per_micro_batch": MICRO_BATCH_TOKENS,
            "num_threads": setting.threads,
        },
        "checkpoint": {"export": False, "every_steps": None},
    }
    if job == "dpo":
        config["algorithm"] = {"loss": "dpo", "beta": 0.1}
        config["ref"] = {"precompute": precompute}
    return from_steps(*run_job(setting, name, job, config), parts=["time/update", "data/fill"])


def trl(setting: Setting, name: str, *, job: str, precompute: bool = False, bf16: bool = False) -> Measured:
    options = {
        "data": data(setting),
        "job": job,
        "batch": PAIRS_PER_STEP,
        "length": MAX_TOKENS,
        "precompute": int(precompute),
    }
    return run_script(setting, name, "preference", options, bf16=bf16)


SHARED = (
    "8 pairs per optimizer step, prompts counted with each response; AdamW, clipping at 1.0, no "
    "checkpointing of activations."
)
DIFFERS = (
    "TRL pads the 16 sequences to the longest; ours packs them into micro-batches of at most 2,048 tokens, "
    "and computes a prompt that a pair shares once."
)
CASES = [
    Case(
        name="dpo",
        title="DPO, reference computed in every step",
        unit="real tokens/s",
        higher_is_better=True,
        sides={OURS: partial(ours, job="dpo"), **both_precisions(TRL, partial(trl, job="dpo"))},
        peer=TRL,
        compared=SHARED,
        differs=DIFFERS,
    ),
    Case(
        name="dpo-precomputed",
        title="DPO, reference computed before training",
        unit="real tokens/s",
        higher_is_better=True,
        sides={
            OURS: partial(ours, job="dpo", precompute=True),
            **both_precisions(TRL, partial(trl, job="dpo", precompute=True)),
        },
        peer=TRL,
        compared=SHARED + " The time of computing it is part of neither.",
        differs=DIFFERS,
        trains_all_weights=True,
    ),
    Case(
        name="rm",
        title="Reward model (Bradley-Terry)",
        unit="real tokens/s",
        higher_is_better=True,
        sides={OURS: partial(ours, job="rm"), **both_precisions(TRL, partial(trl, job="rm"))},
        peer=TRL,
        compared=SHARED,
        differs=DIFFERS,
    ),
]
