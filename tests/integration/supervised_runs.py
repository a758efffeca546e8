"""Configs of tiny supervised runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayrlhf.config.supervised import JOBS


def job(folder: Path, model: str, name: str, **changes: Any) -> Any:
    """A job of seconds; `changes` are nested sections merged into the base."""
    base: dict[str, Any] = {
        "job": name,
        "run": {"name": name, "dir": str(folder / "runs")},
        "model": {"path": model},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_tokens": 96},
        "placement": {"cpus_per_slot": 0.5},
        "train": {
            "samples_per_step": 16,
            "num_steps": 12,
            "lr": 2e-3,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
            "max_tokens_per_micro_batch": 512,
            "num_threads": 1,
        },
        "observe": {"console": "lines", "tensorboard": False},
    }
    for section, values in changes.items():
        old = base.get(section)
        base[section] = {**old, **values} if isinstance(old, dict) else values
    return JOBS[name].model_validate(base)
