"""Configs of tiny runs of batch inference and of chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayrlhf.config.generate import GenerateRunConfig

VOWELS = {"type": "function", "function": "tests.integration.policy_runs:share_of_vowels", "name": "vowels"}


def write_rows(path: Path, count: int) -> Path:
    rows = ({"prompt": f"say {i}", "topic": i, "note": "é"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_generation(folder: Path, model_path: str, /, **changes: Any) -> GenerateRunConfig:
    """Three shards of eight rows; `changes` are sections merged into the base."""
    base: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {"path": model_path},
        "data": {"train": str(write_rows(folder / "rows.jsonl", 24)), "max_prompt_tokens": 64},
        "rollout": {
            "kv_cache_bytes": 64 * 2**20,
            "sampling": {"max_new_tokens": 12},
            "num_threads": 1,
        },
        "generate": {"rows_per_shard": 8},
        "placement": {"preset": "colocate_all", "cpus_per_slot": 0.5},
        "observe": {"console": "lines"},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return GenerateRunConfig.model_validate(base)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
