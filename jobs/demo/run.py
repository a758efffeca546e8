"""`make demo`: PPO on a real model through a real `ray job submit`, on its own Ray cluster.

It builds the model and the prompts if they are missing, starts a local Ray head, submits jobs/ppo.py,
follows its log to the summary, and stops what it started. Exit code 0 if the job succeeded,
whatever the reward.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.local.head import LocalHead
from cluster.local.submit import follow, leave
from cluster.local.submit import submit_command as ray_job_submit
from jobs.demo.data import ensure_data
from jobs.demo.model import MODEL_PATH, REPOSITORY

RUNS_PATH = REPOSITORY / "runs"
RUN_NAME = "demo"
CONFIG = "jobs/configs/demo.yaml"

# Slots for the roles of demo.yaml, not cores: its processes alternate, so they may outnumber the cores.
NUM_CPUS = 4


def main() -> int:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, leave)  # so that the head's `with` block is left cleanly
    run_path = RUNS_PATH / RUN_NAME
    # In a separate process: it loads torch, whose memory the training needs later.
    subprocess.run([sys.executable, "-m", "jobs.demo.model"], cwd=REPOSITORY, check=True)
    train, test = ensure_data()
    if run_path.exists():
        print(f"Removing the previous run {run_path}")
        shutil.rmtree(run_path)
    command = submit_command(train, test)
    print("Starting a local Ray head ...", flush=True)
    with LocalHead(num_cpus=NUM_CPUS, num_gpus=0) as head:
        print(f"Ray is up at {head.jobs_address}\n$ {shlex.join(command)}", flush=True)
        code = follow(command, head.client_env())
        succeeded = code == 0 and (run_path / "summary.json").exists()
        if not succeeded:
            head.save_logs(run_path / "ray-logs")
    if not succeeded:
        print(
            f"The job failed (exit code {code}); Ray's logs are in {run_path / 'ray-logs'}", file=sys.stderr
        )
        return 1
    print(f"Done in {time.monotonic() - started:.0f} s; the Ray head is stopped.")
    return 0


def submit_command(train: Path, test: Path) -> list[str]:
    """The command to submit; paths are absolute: the job runs in an uploaded copy of this repository."""
    overrides = {
        "run.dir": RUNS_PATH,
        "run.name": RUN_NAME,
        "model.path": MODEL_PATH,
        "data.train": train,
        "data.eval": test,
    }
    entrypoint = ["python", "jobs/ppo.py", CONFIG, *(f"{key}={value}" for key, value in overrides.items())]
    return ray_job_submit(entrypoint)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
