"""Processes that grade, each killed and replaced when it misses its deadline.

The time limits of the graders' libraries are made of signals, which only the main thread of a process can
have; a Serve replica has threads. And no signal handler interrupts a long computation inside C code.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from rayrlhf.reward.items import Failure, RewardError

START_SECONDS = 120  # its libraries take a second or two, on a busy machine more
EXIT_SECONDS = 5  # between the end of its output and its own


class GraderPool:
    """`num_processes` graders of a kind (a key of `GRADERS`). Use it as a context, or `close` it."""

    def __init__(self, kind: str, *, num_processes: int, timeout_seconds: float) -> None:
        """Starts all of them. Raises `RewardError` where they do not start."""
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix=f"grader-{kind}")
        self._idle = [GraderProcess(kind, timeout_seconds) for _ in range(num_processes)]
        for process in self._idle:
            process.start()

    async def ask(self, request: dict[str, Any]) -> float | Failure:
        """The grade; waits for a grader that is free."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.grade, request)

    def grade(self, request: dict[str, Any]) -> float | Failure:
        """The same, for callers that may block. No more of them at once than there are processes."""
        process = self._idle.pop()
        try:
            return process.grade(request)
        finally:
            self._idle.append(process)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._idle:
            process.kill()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GraderProcess:
    def __init__(self, kind: str, timeout_seconds: float) -> None:
        self.kind = kind
        self.timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises `RewardError` when it does not come up."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rayrlhf.reward.grader_process", self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={
                **os.environ,
                # Ray puts the folder of a job on the path of its workers.
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                # Threads of numpy's would count against its memory and cores.
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
        )
        line = self._read_line(START_SECONDS)
        if line != b"ready\n":
            status = self.kill(wait_seconds=0 if line is None else EXIT_SECONDS)
            what = f"ended with status {status}" if line == b"" else f"was not ready after {START_SECONDS} s"
            raise RewardError(
                f"the grader of {self.kind} {what}; its output is in the log. "
                "Is its package installed on every node (pip install 'rayrlhf[verify]')?"
            )

    def grade(self, request: dict[str, Any]) -> float | Failure:
        if self._process is None:
            self.start()
        assert self._process is not None and self._process.stdin is not None
        message = json.dumps({**request, "deadline_seconds": self.timeout_seconds}) + "\n"
        try:
            self._process.stdin.write(message.encode())
            line = self._read_line(self.timeout_seconds)
        except BrokenPipeError:
            line = b""
        if not line:
            status = self.kill(wait_seconds=0 if line is None else EXIT_SECONDS)
            if line is None:
                return Failure(f"grading took longer than the source's {self.timeout_seconds:g} s")
            return Failure(f"the grader ended with status {status}")
        answer = json.loads(line)
        return Failure(answer["failure"]) if "failure" in answer else answer["reward"]

    def _read_line(self, timeout_seconds: float) -> bytes | None:
        """A line with its end; b"" when the process has ended, None at the deadline."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + timeout_seconds
        received = b""
        while not received.endswith(b"\n"):
            remaining = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], remaining)[0]:
                return None
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                return b""
            received += part
        return received

    def kill(self, wait_seconds: float = 0) -> int | None:
        """Its exit status, its own if it ends by itself until then; the next grading starts another."""
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_seconds)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        return process.wait()
