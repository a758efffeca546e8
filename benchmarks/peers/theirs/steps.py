"""Step times and real tokens of transformers' Trainer and of plain loops, and the answer file that they go
to."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def parse(**more: type) -> argparse.Namespace:
    """The settings that each script has: paths, and how many steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--answer", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bf16", type=int, required=True)  # autocast
    for name, kind in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, required=True)
    return parser.parse_args()


def trainer_arguments(options: argparse.Namespace, *, learning_rate: float) -> dict[str, Any]:
    """Arguments of every trainer of TRL: fp32 weights, nothing saved, no activations checkpointed."""
    return {
        "output_dir": str(options.answer.with_suffix("")),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "gradient_checkpointing": False,
        "bf16": bool(options.bf16),
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": learning_rate,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
    }


class StepTimes(TrainerCallback):
    """The end of each optimizer step; `tokens` holds the real tokens of each, padding left out."""

    def __init__(self) -> None:
        self.began = self.began_at = 0.0
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.current = 0
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_done()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def start(self) -> None:
        self.began, self.began_at = time.perf_counter(), time.time()

    def step_done(self) -> None:
        self.ends.append(time.perf_counter())
        self.tokens.append(self.current)
        self.current = 0

    def count(self, trainer: Any) -> None:
        """Count the real tokens of what `trainer.training_step` gets."""
        original = trainer.training_step

        def training_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            self.current += real_tokens(inputs)
            return original(model, inputs, *rest, **named)

        trainer.training_step = training_step

    def answer(self, path: Path, **more: Any) -> None:
        starts = [self.began, *self.ends[:-1]]
        seconds = [end - start for start, end in zip(starts, self.ends, strict=True)]
        found = {"seconds": seconds, "tokens": self.tokens, "losses": self.losses, "began_at": self.began_at}
        path.write_text(json.dumps(found | more))


def real_tokens(inputs: Any) -> int:
    """Of a batch: where there is an attention mask, its sum; without one there is no padding."""
    if inputs.get("attention_mask") is not None:
        return int(inputs["attention_mask"].sum())
    return int(inputs["input_ids"].numel())


def autocast(options: argparse.Namespace) -> torch.autocast:
    """For a plain loop, what TRL's `bf16` is."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(options.bf16))


def use_threads(count: int) -> None:
    torch.set_num_threads(count)
