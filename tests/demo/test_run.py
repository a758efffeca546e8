"""The demo's driver, without Ray: the command that it submits and what it passes on of the job's log."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster.local.submit import follow
from jobs.demo.run import submit_command

PASSED_ON = [
    "  0:12 step 1/30  reward -0.112",
    "(PolicyWorker pid=12) 2026-11-23 13:10:24,993\tWARNING worker.py:9 -- slow",
    "2026-11-23 13:10:32,047\tERR cli.py:68 -- Job 'raysubmit_x' failed",
    "INFO is a word of ours",
]
DROPPED = [
    "2026-11-23 13:10:23,739\tINFO cli.py:42 -- Job submission server address: http://127.0.0.1:8265",
    "2026-11-23 13:10:24,993\tSUCC cli.py:66 -- \x1b[32m-----------\x1b[39m",
    "2026-11-23 13:10:24,845\tINFO job_manager.py:581 -- Runtime env is setting up.",
    "2026-11-23 13:34:33,052\tWARNING working_dir.py:101 -- Directory '.git' is now ignored by default",
    "Running entrypoint for job raysubmit_x: python jobs/ppo.py",
    "\x1b[36m(TrainController pid=77)\x1b[0m 2026-11-23 13:10:24,845\tINFO controller.py:5 -- starting",
    "(raylet, ip=10.0.0.1, pid=5) 2026-11-23 13:10:24,845 INFO node.py:7 -- hello",
]


def test_rays_chatter_is_left_out_and_the_exit_code_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{line}\n" for pair in zip(DROPPED, PASSED_ON, strict=False) for line in pair))
    with log.open("a") as file:
        file.writelines(f"{line}\n" for line in DROPPED[len(PASSED_ON) :])
    code = follow(
        [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read(), end=''); sys.exit(7)", str(log)],
        dict(os.environ),
    )
    assert code == 7
    assert capsys.readouterr().out.splitlines() == PASSED_ON


def test_errors_of_the_command_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert follow([sys.executable, "-c", "raise SystemExit('no such job')"], dict(os.environ)) == 1
    assert capsys.readouterr().out == "no such job\n"


def test_every_path_in_the_command_is_absolute() -> None:
    command = submit_command(Path("/data/train.jsonl"), Path("/data/test.jsonl"))
    assert command[:8] == ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/ppo.py"]
    overrides = dict(word.split("=") for word in command[9:])
    assert overrides["data.train"] == "/data/train.jsonl"
    assert overrides["data.eval"] == "/data/test.jsonl"
    assert Path(overrides["run.dir"]).is_absolute()
    assert Path(overrides["model.path"]).is_absolute()
