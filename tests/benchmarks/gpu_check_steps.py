"""Steps that end in every way there is, for tests of gpu-check's runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.peer import Peer
from benchmarks.gpu_check.step import Context, Skip


def passes(context: Context) -> None:
    context.record("rate", 12.34567, "GB/s")
    context.record("kernel", "varlen")


def fails(context: Context) -> None:
    context.record("rate", 1, "GB/s")
    assert 1 > 2, "one is not more than two"


def skips(context: Context) -> None:
    raise Skip("needs what is not here")


def hangs(context: Context) -> None:
    """With a child, whose process id it records first."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.record("child", child.pid)
    time.sleep(600)


def dies(context: Context) -> None:
    context.record("rate", 2, "GB/s")
    os.kill(os.getpid(), signal.SIGSEGV)


def ends_early(context: Context) -> None:
    os._exit(0)


def passes_once_a_file_is_there(context: Context) -> None:
    """The file that the test names in the environment."""
    assert Path(os.environ["GPU_CHECK_TEST_FILE"]).exists(), "not yet"


class Doubler:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def times(self, number: int) -> int:
        return self.factor * number

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self) -> None:
        raise ValueError("no such number")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def asks_a_peer(context: Context) -> None:
    with Peer(Doubler, 2, environment={"GPU_CHECK_VARIABLE": "set"}) as peer:
        context.record("product", peer.ask("times", 21))
        context.record("in the peer", str(peer.ask("variable", "GPU_CHECK_VARIABLE")))
    context.record("here", str(os.environ.get("GPU_CHECK_VARIABLE")))
