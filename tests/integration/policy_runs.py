"""Configs of tiny policy runs, and rewards that tiny models can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayrlhf.config.policy import PolicyRunConfig


def share_of_vowels(
    prompts: list[str], responses: list[str], labels: list[Any], **columns: Any
) -> list[float]:
    """Share of characters that are vowels. Byte-level models start near 5/256 and can reach 1."""
    return [sum(c in "aeiou" for c in response) / max(1, len(response)) for response in responses]


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "topic": i}) + "\n" for i in range(count)))
    return path


def tiny_run(folder: Path, model_path: str, /, **changes: Any) -> PolicyRunConfig:
    """A run of seconds; `changes` are nested sections merged into the base, e.g. `train={"num_steps": 3}`."""
    base: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {"path": model_path},
        "data": {"train": str(write_prompts(folder / "train.jsonl", 64)), "max_prompt_tokens": 64},
        "critic": {"lr": 1e-3},
        "algorithm": {"kl_coef": 0.001},
        "rollout": {
            "prompts_per_step": 32,
            "kv_cache_bytes": 64 * 2**20,
            "sampling": {"max_new_tokens": 12},
            "num_threads": 1,
        },
        "eval": {"sampling": {"max_new_tokens": 12, "temperature": 1.0}},
        "reward": {
            "sources": [{"type": "function", "function": "tests.integration.policy_runs:share_of_vowels"}]
        },
        "placement": {"preset": "colocate_all", "cpus_per_slot": 0.5},
        "train": {"num_steps": 4, "lr": 2e-3, "max_tokens_per_micro_batch": 1024, "num_threads": 1},
        "observe": {"console": "lines"},
    }
    for section, values in changes.items():
        old = base.get(section)
        base[section] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
    return PolicyRunConfig.model_validate({k: v for k, v in base.items() if v is not None})
