"""The Slurm script, executed with stubs of Slurm's and Ray's commands that log their arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rayrlhf.commands.render.rendering import rendering_of
from rayrlhf.commands.render.scripts import render_slurm
from rayrlhf.config.job_kinds import load_any

REPOSITORY = Path(__file__).parents[3]
SHIMS = {
    "scontrol": 'printf "%s\\n" node1 node2 node3',
    # Runs the command behind its own options: here, wherever -w says.
    "srun": 'echo "srun $*" >> "$LOG"; '
    'while [[ $1 == -* ]]; do if [ "$1" = -w ]; then export ON=$2; shift; fi; shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": 'echo "$ON: ray $*" >> "$LOG"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$LOG"; exec sleep 60',
    # Waiting for the nodes takes as long as they need to write.
    "python": 'echo "python $*" >> "$LOG"; [[ $* != *wait_for* ]] || sleep 2; exit "${EXIT:-0}"',
}


@pytest.mark.parametrize("exit_code", [0, 3])
def test_head_workers_job_and_clean_up(
    exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    argv = [
        "jobs/configs/ppo-8x-gpu.yaml",
        "launch.gpus_per_node=3",
        "launch.slurm.setup=[export FROM_SETUP=1]",
    ]
    script = render_slurm(rendering_of(load_any(argv), argv))
    assert "#SBATCH --nodes=3\n" in script and "#SBATCH --gres=gpu:3\n" in script
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, body in SHIMS.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (shims / name).chmod(0o755)
    # The job's python fails; the one that waits for nodes does not.
    script = script.replace("python jobs/ppo.py", f"env EXIT={exit_code} python jobs/ppo.py")
    log = tmp_path / "log"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={
            "PATH": f"{shims}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "96",
            "LOG": str(log),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == exit_code, done.stderr
    lines = log.read_text().splitlines()
    steps = [line for line in lines if line.startswith("srun ") and " hostname " not in line]
    log_lines = [line for line in lines if not line.startswith("srun ")]
    heads = [line for line in log_lines if line.startswith("node1: ray start --head")]
    workers = {line.split(":")[0] for line in log_lines if "ray start --address=10.0.0.1:6379" in line}
    assert len(heads) == 1 and "--port=6379" in heads[0] and workers == {"node2", "node3"}
    assert all("--num-gpus=3" in line for line in log_lines if "ray start" in line)
    assert len(steps) == 4, "a head, two workers, the driver"
    assert all(" --cpus-per-task=96 " in step for step in steps), "else a step may be bound to one core"
    assert log_lines.count("600") == 3, "every node reads a token that other users cannot"
    commands = [line for line in log_lines if line.startswith("python ")]
    assert commands[0] == "python -m rayrlhf.commands.render.wait_for_nodes 3"
    assert commands[1].startswith("python jobs/ppo.py jobs/configs/ppo-8x-gpu.yaml")
    assert f"run.dir={tmp_path}/runs" in commands[1]
    assert not list(tmp_path.glob(".ray-token-*")), "the token goes with the job"
