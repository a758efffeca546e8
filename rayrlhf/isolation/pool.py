"""Pool of subprocesses with the same user code: distributes calls, replaces processes that die or hang.

A call that runs alone in a process that dies is the cause. Calls that ran concurrently with others are
repeated once, each alone in a separate process: they are served, and the faulty one is identified.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.isolation.frames import CodeTimeout, ProcessDied
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.process import CodeProcess, Hosted

OUTPUT_SECONDS = 5.0  # for what is left in the pipes of processes that have ended
NUM_ALONE = 4  # max concurrent calls that run in a separate process each


@dataclass(eq=False)
class _Loaded:
    process: CodeProcess
    began: list[float] = field(default_factory=list)  # start time of every call or context that uses it

    @property
    def has_room(self) -> bool:
        return self.process.takes_calls and len(self.began) < self.process.max_calls


class ProcessPool:
    """`num_processes` processes, and up to `num_extra` more while calls that take longer than `slow_seconds`
    occupy the others. Bound to one event loop; use it as a context, or `start` it and `close` or `kill` it.
    """

    def __init__(
        self,
        hosted: Hosted,
        output: OutputLog,
        *,
        num_processes: int = 1,
        num_extra: int = 2,
        slow_seconds: float = 5.0,
    ) -> None:
        self.hosted = hosted
        self.output = output
        self.num_processes = num_processes
        self.num_extra = num_extra
        self.slow_seconds = slow_seconds
        self.num_started = 0
        self._processes: list[_Loaded] = []  # including retired ones, until they have ended
        self._num_starting = 0
        self._changed = asyncio.Event()  # replaced by a new one after each change
        self._queue = asyncio.Lock()  # its holder is the next to get a process
        self._alone = asyncio.Semaphore(NUM_ALONE)
        self._background: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start all `num_processes`. Raises `CodeError` if the code cannot be used."""
        starting = [self._start() for _ in range(self.num_processes)]
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(outcome, BaseException):
                await self.kill()
                raise outcome

    async def __aenter__(self) -> ProcessPool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Returns the result of the host's method. Raises `CodeError` with the reason, `CodeTimeout`, and
        `ProcessDied` for a call that has ended its process. If the caller is cancelled, the call runs on
        until its deadline.
        """
        loaded, began = await self._place()
        return await asyncio.shield(self._spawn(self._call(loaded, began, method, arguments)))

    @asynccontextmanager
    async def process(self) -> AsyncIterator[CodeProcess]:
        """One of the processes, for a caller that needs the same one several times."""
        loaded, began = await self._place()
        try:
            yield loaded.process
        finally:
            await asyncio.shield(self._spawn(self._leave(loaded, began)))

    @asynccontextmanager
    async def own_process(self) -> AsyncIterator[CodeProcess]:
        """A new process for this caller alone, after the previous one has died during its call."""
        async with self._alone:
            process = CodeProcess(self.hosted, self.output)
            self.num_started += 1
            await process.start()
            try:
                yield process
            finally:
                await process.kill()

    async def retire(self, process: CodeProcess) -> None:
        """Give it no more calls; it ends after its last call, or at once if it does not respond."""
        process.retired = True
        self._notify()
        if not await process.answers():
            await process.kill()

    def close(self) -> None:
        """Request that all processes be killed; does not wait. Needs no running loop."""
        for loaded in self._processes:
            loaded.process.close()
        self.output.close()

    async def kill(self) -> None:
        """Kill all processes and wait until they have ended."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(loaded.process.kill() for loaded in self._processes))
        self._processes.clear()
        await asyncio.get_running_loop().run_in_executor(None, self.output.close, OUTPUT_SECONDS)

    async def _call(self, loaded: _Loaded, began: float, method: str, arguments: tuple[Any, ...]) -> Any:
        process = loaded.process
        try:
            return await process.call(method, *arguments)
        except CodeTimeout:
            if len(loaded.began) == 1:
                await process.kill()
                raise
            await self.retire(process)
            if not process.died:
                raise
            # Another call may have held the interpreter's lock.
        except ProcessDied as died:
            if died.alone:
                raise
        finally:
            await self._leave(loaded, began)
        return await self._call_alone(method, arguments)

    async def _call_alone(self, method: str, arguments: tuple[Any, ...]) -> Any:
        async with self.own_process() as process:
            return await process.call(method, *arguments)

    async def _place(self) -> tuple[_Loaded, float]:
        """A process with a free slot, and the start time recorded there. First come, first served."""
        starting: asyncio.Task[None] | None = None
        async with self._queue:
            while not (free := [each for each in self._processes if each.has_room]):
                if starting is not None and starting.done():
                    starting.result()  # raises the error of the start
                    starting = None
                if starting is None and self._may_start():
                    starting = self._spawn(self._start())
                change = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({change}, timeout=self.slow_seconds / 2)  # a process may have become slow
                change.cancel()
            loaded = min(free, key=lambda each: len(each.began))
            now = time.monotonic()
            loaded.began.append(now)
            return loaded, now

    def _may_start(self) -> bool:
        slow = self._full_of_slow()
        for each in slow:
            each.process.lower_priority()
        living = sum(each.process.takes_calls for each in self._processes)
        return living + self._num_starting < self.num_processes + min(len(slow), self.num_extra)

    def _full_of_slow(self) -> list[_Loaded]:
        now = time.monotonic()
        return [
            each
            for each in self._processes
            if each.process.takes_calls
            and not each.has_room
            and all(now - began > self.slow_seconds for began in each.began)
        ]

    async def _start(self) -> None:
        process = CodeProcess(self.hosted, self.output)
        self._num_starting += 1
        self.num_started += 1
        try:
            await process.start()
            self._processes.append(_Loaded(process))
        finally:
            self._num_starting -= 1
            self._notify()

    async def _leave(self, loaded: _Loaded, began: float) -> None:
        loaded.began.remove(began)
        idle = not loaded.began
        quick = sum(each.process.takes_calls for each in self._processes) - len(self._full_of_slow())
        if idle and (not loaded.process.takes_calls or quick > self.num_processes):
            await loaded.process.kill()
        self._processes = [each for each in self._processes if each.began or each.process.takes_calls]
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        # The waiting caller may have been cancelled: mark the exception as retrieved.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task
