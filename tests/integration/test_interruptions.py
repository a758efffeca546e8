"""One run through everything that may interrupt it, as a person sees it: a second start of the same name, a
worker that is killed, and Ctrl-C while a reward model scores training rows before its export.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.supervised_data import pairs, write

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

REPOSITORY = Path(__file__).resolve().parents[2]
REFUSAL_SECONDS = 120  # of a process that imports everything; a few on an idle machine


def test_what_interrupts_a_run_is_one_true_line(tmp_path: Path, tiny_model: str) -> None:
    command = [sys.executable, "jobs/rm.py", str(write_config(tmp_path, tiny_model))]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        seen: list[str] = []
        lines = said(job, seen)
        until(lines, "starting 1 x trainer")

        second = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=REFUSAL_SECONDS
        )
        assert second.returncode == 2
        assert f"run.name=rm is in use by process {job.pid} on " in " ".join(second.stderr.split())

        until(lines, "step 4/40 ")
        [worker] = [p for p in psutil.Process(job.pid).children(recursive=True) if is_worker(p)]
        worker.kill()
        died = until(lines, "worker 0 died")
        assert re.search(
            r"warning: actor worker 0 died \(its process was killed or crashed; out of host memory is the "
            r"usual reason\) after step \d+, in [a-z ]+; the workers start again from step \d+ "
            r"\(restart 1 of train.max_failures=1\)\n",
            died,
        )
        saved = int(re.findall(r"from step (\d+) ", died)[0])
        assert until(lines, "resuming").endswith(f"resuming after step {saved}\n")

        until(lines, "score training rows")
        job.send_signal(signal.SIGINT)
        assert until(lines, "interrupted").endswith("; the same command resumes from step 40 of 40\n")
        assert job.wait(120) == 130
    whole = "".join(seen)
    assert "\x1b" not in whole and "Traceback" not in whole and "(raylet)" not in whole
    assert "raylet: A worker died" in (tmp_path / "runs" / "rm" / "ray.log").read_text()


def write_config(folder: Path, model: str) -> Path:
    write(folder / "pairs.jsonl", pairs(600))
    tree = {
        "run": {"name": "rm", "dir": str(folder / "runs")},
        "model": {"path": model},
        "data": {"train": str(folder / "pairs.jsonl"), "max_tokens": 64},
        "train": {
            "num_steps": 40,
            "samples_per_step": 16,
            "max_tokens_per_micro_batch": 256,
            "num_threads": 1,
        },
        "checkpoint": {"every_steps": 2},
    }
    (folder / "rm.yaml").write_text(yaml.safe_dump(tree))
    return folder / "rm.yaml"


def said(job: subprocess.Popen[str], seen: list[str]) -> Iterator[str]:
    assert job.stdout is not None
    for line in job.stdout:
        print(line, end="")
        seen.append(line)
        yield line


def until(lines: Iterator[str], text: str) -> str:
    found = next((line for line in lines if text in line), None)
    assert found is not None, f"the job ended before it said {text!r}"
    return found


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
