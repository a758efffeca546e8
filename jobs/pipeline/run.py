"""`make pipeline`: SFT, a reward model, PPO with it, and DPO, each stage from the exports of earlier ones.

    model -> SFT -> reward model -> PPO (actor from SFT, critic and reward from the reward model)
                 -> DPO

Every stage is one of the shipped CPU configs with a few overrides, and is printed as its command line. A
finished stage, whose run folder has a summary, is not repeated.

Usage: `python -m jobs.pipeline.run [--model FOLDER] [--runs FOLDER] [--fresh] [key.path=value ...]`; the
overrides go to every stage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.demo.data import ensure_data as ensure_prompts
from jobs.demo.model import MODEL_PATH, REPOSITORY
from jobs.tasks.sentences import ensure_data as ensure_sentences

RUNS_PATH = REPOSITORY / "runs" / "pipeline"


@dataclass(frozen=True)
class Stage:
    name: str
    job: str  # jobs/<job>.py
    config: str  # jobs/configs/<config>.yaml
    overrides: dict[str, Any]

    def command(self, runs: Path, more: Sequence[str]) -> list[str]:
        given = {"run.dir": runs, "run.name": self.name, **self.overrides}
        return [
            "python",
            f"jobs/{self.job}.py",
            f"jobs/configs/{self.config}.yaml",
            *(f"{key}={value}" for key, value in given.items()),
            *more,
        ]


def stages(model: str | Path, runs: Path) -> list[Stage]:
    sft, rm = runs / "sft" / "export", runs / "rm" / "export"
    reward_sources = json.dumps([{"type": "model", "path": str(rm), "name": "trained"}])
    return [
        Stage("sft", "sft", "sft-cpu", {"model.path": model}),
        Stage("rm", "rm", "rm-cpu", {"model.path": sft}),
        Stage(
            "ppo",
            "ppo",
            "demo",
            {
                "model.path": sft,
                "critic.path": rm,
                "reward.sources": reward_sources,
                "train.num_steps": 6,
                "train.lr": 1e-5,
            },
        ),
        Stage("dpo", "dpo", "dpo-cpu", {"model.path": sft}),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_PATH), help="a folder, or an id of the hub")
    parser.add_argument("--runs", type=Path, default=RUNS_PATH)
    parser.add_argument("--fresh", action="store_true", help="remove former runs first")
    parser.add_argument("overrides", nargs="*", help="key.path=value, for every stage")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    ensure_prompts()
    ensure_sentences()
    runs = arguments.runs.resolve()
    if arguments.fresh:
        shutil.rmtree(runs, ignore_errors=True)
    model = Path(arguments.model).resolve() if Path(arguments.model).is_dir() else arguments.model
    for stage in stages(model, runs):
        if not run_stage(stage, runs, arguments.overrides):
            return 1
    print(f"\nResults of the stages, {time.monotonic() - started:.0f} s in all:")
    for stage in stages(model, runs):
        print(f"  {stage.name:4} {outcome(runs / stage.name)}")
    return 0


def run_stage(stage: Stage, runs: Path, overrides: Sequence[str]) -> bool:
    """Run a stage unless it is finished. Returns whether it has succeeded."""
    command = stage.command(runs, overrides)
    print(f"\n$ {shlex.join(command)}", flush=True)
    if (runs / stage.name / "summary.json").is_file():
        print("already finished; --fresh runs it again", flush=True)
        return True
    code = subprocess.run([sys.executable, *command[1:]], cwd=REPOSITORY).returncode
    if code:
        print(f"stage {stage.name} failed (exit code {code})", file=sys.stderr)
    return code == 0


def outcome(run_path: Path) -> str:
    """One line: metrics before and after, and the path of the model."""
    summary = json.loads((run_path / "summary.json").read_text())
    if "evaluation" in summary:
        before, after = (summary["evaluation"][when] for when in ("before", "after"))
        keys = [key for key in ("eval/loss", "eval/accuracy", "eval/margin") if key in after]
        changes = [f"{key.removeprefix('eval/')} {before[key]:.3f} -> {after[key]:.3f}" for key in keys]
    else:
        changes = [f"reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}"]
    return f"{', '.join(changes)}; {summary['export']}"


if __name__ == "__main__":
    raise SystemExit(main())
