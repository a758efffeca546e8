"""A PPO run of a tiny model, by the job as users start it: Ray, Serve, vLLM and DeepSpeed on one device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_check.step import Context
from rayrlhf.config.parse import dump_resolved
from tests.integration.policy_runs import tiny_run
from tests.tiny_model import make_tiny_model

STEPS = 3


def run(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_run(
            Path(folder),
            make_tiny_model(Path(folder) / "model"),
            train={"num_steps": STEPS, "zero_stage": 2},
            rollout={"gpu_memory_utilization": 0.3, "sleep": True},
            placement={"preset": "colocate_all", "gpus_per_slot": 1 if context.on_gpu else 0},
        )
        path = Path(folder) / "config.yaml"
        path.write_text(dump_resolved(config))
        started = time.perf_counter()
        subprocess.run([sys.executable, "jobs/ppo.py", str(path)], check=True)
        context.record("the whole job", time.perf_counter() - started, "s")
        run_path = Path(config.run.path)
        steps = json.loads((run_path / "summary.json").read_text())["steps"]
        events = [json.loads(line)["what"] for line in (run_path / "turns.jsonl").read_text().splitlines()]
    context.record("steps", steps)
    # In every step engines sleep, and wake with its weights; on a GPU they also sleep while models load.
    for what in ("optimizer and gradients reloaded", "awake: weights", "awake: kv_cache"):
        assert events.count(what) >= STEPS, events
    pushed = all(f"loaded version {version}" in events for version in range(1, STEPS + 1))
    assert steps == STEPS and pushed, (steps, events)
