"""Client of one subprocess with user code: start, call, kill."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rayrlhf.isolation.frames import (
    HEADER,
    MAX_ANSWER_BYTES,
    CodeError,
    CodeTimeout,
    ProcessDied,
    frame,
)
from rayrlhf.isolation.host import PING, READY
from rayrlhf.isolation.output import OutputLog

PONG_SECONDS = 2.0
CLOSED_SECONDS = 1.0  # between the end of the answers and the end of the process
END_SECONDS = 10.0  # for the guard to kill the remaining processes and report how the host ended
LOW_PRIORITY = 5  # nice value: a third of the CPU share of others, and all idle CPU time
MEMORY_SHARE = 0.5  # of the machine's memory, if no limit is set


@dataclass(frozen=True)
class Hosted:
    """The host class that runs in the process, and its limits."""

    host: str  # "module:Class" of rayrlhf, constructed with `arguments`
    arguments: tuple[Any, ...]
    start_timeout_seconds: float
    timeout_seconds: float  # of one call
    start_key: str = "start_timeout_seconds"  # config keys that messages name for the two timeouts
    timeout_key: str = "timeout_seconds"
    max_memory_gib: float | None = None
    env_vars: tuple[tuple[str, str], ...] = ()

    @property
    def max_memory_bytes(self) -> int:
        if self.max_memory_gib is not None:
            return int(self.max_memory_gib * 2**30)
        return int(MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


class CodeProcess:
    """Bound to one event loop. Runs up to `max_calls` calls concurrently (known once it has started)."""

    def __init__(self, hosted: Hosted, output: OutputLog) -> None:
        self.hosted = hosted
        self.output = output
        self.max_calls = 0
        self.retired = False  # takes no more calls
        self.died = ""  # reason, once it has ended
        self._closing = False
        self._pid = 0  # reported by the process itself: used only to set its priority
        self._number = READY
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._popen: subprocess.Popen[bytes] | None = None
        self._requests: asyncio.WriteTransport | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    @property
    def takes_calls(self) -> bool:
        return bool(self.max_calls) and not self.died and not self.retired

    async def start(self) -> None:
        """Raises `CodeError` if the code cannot be used, `CodeTimeout` and `ProcessDied`."""
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        output_read, output_write = os.pipe()
        theirs = (request_read, answer_write, output_write)
        self._popen = subprocess.Popen(
            # -P: the current folder must not shadow modules of the standard library.
            [sys.executable, "-P", "-m", "rayrlhf.isolation.child"]
            + [str(number) for number in (*theirs, self.hosted.max_memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=theirs,
            start_new_session=True,
            # Ray adds a job's folder to sys.path of its workers.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                **dict(self.hosted.env_vars),
            },
        )
        for fd in theirs:
            os.close(fd)
        self.output.read(output_read)
        loop = asyncio.get_running_loop()
        self._requests, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(request_write, "wb", 0))
        ready = self._calls[READY] = loop.create_future()
        self._reading = asyncio.ensure_future(self._read(answer_read))
        self._requests.write(frame(pickle.dumps((self.hosted.host, self.hosted.arguments))))
        try:
            self.max_calls, self._pid = await asyncio.wait_for(ready, self.hosted.start_timeout_seconds)
        except TimeoutError:
            await self.kill()
            seconds = f"{self.hosted.start_timeout_seconds:g} s ({self.hosted.start_key})"
            raise CodeTimeout(f"its import took longer than {seconds}") from None
        except BaseException:
            await self.kill()
            raise
        finally:
            self._calls.pop(READY, None)

    async def call(self, method: str, *arguments: Any, timeout_seconds: float | None = None) -> Any:
        """Returns the result of the host's method. Raises `CodeError` with the reason, `CodeTimeout` at the
        deadline (the call is still running in the process) and `ProcessDied`.
        """
        if self.died:
            raise ProcessDied(self.died)
        assert self._requests is not None
        self._number += 1
        number = self._number
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        seconds = timeout_seconds or self.hosted.timeout_seconds
        try:
            self._requests.write(frame(pickle.dumps((number, method, arguments))))
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            raise CodeTimeout(f"took longer than {seconds:g} s ({self.hosted.timeout_key})") from None
        finally:
            self._calls.pop(number, None)

    def lower_priority(self) -> None:
        """Lower the CPU priority of the process."""
        with suppress(OSError):  # the process may have ended
            os.setpriority(os.PRIO_PROCESS, self._pid, LOW_PRIORITY)

    async def answers(self) -> bool:
        """Whether its event loop responds: not while a call holds the interpreter's lock or blocks it."""
        try:
            await self.call(PING, timeout_seconds=PONG_SECONDS)
        except CodeError:
            return False
        return True

    def close(self) -> None:
        """Make the guard kill everything; does not wait. Needs no running loop."""
        self.retired = self._closing = True
        if self._popen is not None and self._popen.stdin is not None:
            self._popen.stdin.close()

    async def kill(self) -> None:
        """Close, and wait until the process has ended."""
        self.close()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    async def _read(self, fd: int) -> None:
        """Read answers until the pipe ends, then fail all pending calls with the reason."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
        )
        broken = ""
        try:
            while True:
                [length] = HEADER.unpack(await reader.readexactly(HEADER.size))
                if length > 2 * MAX_ANSWER_BYTES:
                    raise ValueError(f"an answer of {length} bytes")
                self._take(json.loads(await reader.readexactly(length)))
        except asyncio.IncompleteReadError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            broken = f"something else wrote into the pipe of its answers: {error}"
        transport.close()
        how = await loop.run_in_executor(None, self._exit_report)
        self.died = broken or self._in_words(how)
        if self._requests is not None:
            self._requests.close()
        # A call that has missed its deadline is still running in the process.
        alone = len(self._calls) == 1 and not self.retired
        for future in self._calls.values():
            if not future.done():
                future.set_exception(ProcessDied(self.died, alone=alone))

    def _take(self, answer: dict[str, Any]) -> None:
        future = self._calls.get(answer["id"])
        if future is None or future.done():  # too late
            return
        if "error" in answer:
            future.set_exception(CodeError(answer["error"]))
        else:
            future.set_result(answer["result"])

    def _exit_report(self) -> dict[str, Any]:
        """The guard's report of how the host ended; {} if there is none."""
        popen = self._popen
        assert popen is not None and popen.stdin is not None and popen.stdout is not None
        try:
            popen.wait(END_SECONDS if self._closing else CLOSED_SECONDS)
        except subprocess.TimeoutExpired:  # still running, but it has closed its pipe
            popen.stdin.close()
            try:
                popen.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()
        popen.stdin.close()
        with popen.stdout as file:
            said = file.read()
        return json.loads(said) if said else {}

    def _in_words(self, how: dict[str, Any]) -> str:
        last = f"; its last output: {self.output.last_line!r}" if self.output.last_line else ""
        if "memory" in how:
            return (
                f"its process was killed: it used {how['memory'] / 2**30:.2g} GiB of memory, more than "
                f"{self.hosted.max_memory_bytes / 2**30:.2g} GiB (max_memory_gib)"
            )
        if "exit" in how:
            return f"it ended its own process with exit code {how['exit']}" + last
        if "signal" in how:
            name = signal.Signals(how["signal"]).name
            held = f"{how['peak_bytes'] / 2**30:.2g} GiB"
            why = f", as happens when memory runs out (it held {held})" if name == "SIGKILL" else ""
            return f"its process was killed by {name}{why}"
        return "its process has ended" if self._closing else "it closed the pipe of its answers"
