"""`python -m cluster.local.submit -- python jobs/ppo.py …`: the job on a Ray head of its own.

Starts the head, submits the command with the repository as its working directory, passes its log on and stops
the head. The exit code is the job's.
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from cluster.local.head import LocalHead
from rayrlhf.untrusted_text import COLOUR, write_line

REPOSITORY = Path(__file__).parents[2]

# A line of Ray's own logger at level INFO or SUCC, perhaps forwarded from a worker:
# "(Name pid=1) 2026-01-01 00:00:00,000<tab>INFO cli.py:39 -- ...", or its word that .git stays here.
RAY_CHATTER = re.compile(
    r"(\x1b\[\d+m)*(\([^)]*\bpid=\d+[^)]*\)(\x1b\[\d+m)* )?"
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+((INFO|SUCC)\s+\w+\.py|WARNING\s+working_dir\.py):\d+ -- "
    r"|Running entrypoint for job "
)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.local.submit")
    parser.add_argument("--num-cpus", type=int, help="CPUs that Ray may hand out; slots, not cores")
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("entrypoint", nargs="+", metavar="COMMAND", help="after --, what to run")
    options = parser.parse_args(words)
    signal.signal(signal.SIGTERM, leave)  # so that the head's `with` block ends in order
    command = submit_command(options.entrypoint)
    print("Starting a local Ray head ...", flush=True)
    with LocalHead(num_cpus=options.num_cpus, num_gpus=options.num_gpus) as head:
        print(f"Ray is up at {head.jobs_address}\n$ {shlex.join(command)}", flush=True)
        return follow(command, head.client_env())


def submit_command(entrypoint: list[str]) -> list[str]:
    """What a user would type."""
    return ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint]


def follow(command: list[str], environment: dict[str, str]) -> int:
    """Run `command` in the repository and pass on its lines, but Ray's chatter; the exit code."""
    submitter = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        assert submitter.stdout is not None
        for line in submitter.stdout:
            if not RAY_CHATTER.match(line):
                # The job's own words are clean; what a library or the user's code printed may not be.
                write_line(COLOUR.sub("", line.rstrip("\n")))
        return submitter.wait()
    finally:
        if submitter.poll() is None:
            submitter.kill()
            submitter.wait()


def leave(number: int, frame: FrameType | None) -> None:
    """A signal handler: out through every `finally`."""
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
