"""What foreign code does to its process costs that process, one call and one clear line."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.isolation.frames import CodeError, CodeTimeout, ProcessDied
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.isolation.process import Hosted

HOST = "tests.isolation.hosts:Evaluator"


@asynccontextmanager
async def pool_of(
    *arguments: Any,
    start: float = 60,
    timeout: float = 60,
    memory: float | None = None,
    log: OutputLog | None = None,
    **options: Any,
) -> AsyncIterator[ProcessPool]:
    hosted = Hosted(HOST, arguments, start, timeout, max_memory_gib=memory)
    async with ProcessPool(hosted, log or OutputLog("code"), **options) as pool:
        yield pool


def with_pool(body: Callable[[ProcessPool], Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
    async def main() -> Any:
        async with pool_of(*arguments, **options) as pool:
            return await body(pool)

    return asyncio.run(main())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (
        FileNotFoundError,
        ProcessLookupError,
    ):  # The second, where the process ends between open and read.
        return False
    return state != "Z"


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.05)


@pytest.mark.parametrize(
    "expression, message",
    [
        ("exit()", r"SystemExit: None"),
        ("sys.exit(3)", r"SystemExit: 3"),
        ("interrupt()", r"KeyboardInterrupt: as by Ctrl-C \(hosts.py:\d+\)"),
        ("input()", r"EOFError: EOF when reading a line"),
        ("object()", r"returned a value that is not plain data \(an object of type object\)"),
        ("'x' * (65 << 20)", r"returned 65 MiB; the limit is 64 MiB"),
    ],
)
def test_what_ends_a_call_and_nothing_else(expression: str, message: str) -> None:
    async def body(pool: ProcessPool) -> None:
        with pytest.raises(CodeError, match=message):
            await pool.call("run", expression)
        assert await pool.call("run", "7") == 7
        assert pool.num_started == 1

    with_pool(body)


@pytest.mark.parametrize(
    "expression, message",
    [
        ("os._exit(0)", "it ended its own process with exit code 0$"),
        ("print('so long') or os._exit(4)", "it ended its own process with exit code 4; .* 'so long'"),
        ("crash()", "its process was killed by SIGSEGV$"),
        ("os.abort()", "its process was killed by SIGABRT$"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, as happens when memory runs out .it held 0"),
        (  # whichever of its ends is seen first
            "os.closerange(3, 1000) or time.sleep(1000)",
            "it closed the pipe of its answers|it ended its own process with exit code 0",
        ),
    ],
)
def test_what_ends_the_process_is_named_and_the_process_replaced(expression: str, message: str) -> None:
    async def body(pool: ProcessPool) -> None:
        with pytest.raises(ProcessDied, match=message):
            await pool.call("run", expression)
        assert await pool.call("run", "7") == 7
        assert pool.num_started == 2

    with_pool(body)


def test_calls_concurrent_with_one_that_ends_the_process_are_served() -> None:
    async def body(pool: ProcessPool) -> list[Any]:
        others = [pool.call("run", f"time.sleep(0.3) or {i}") for i in range(5)]
        calls = [*others, pool.call("run", "time.sleep(0.1) or os._exit(1)")]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    *served, died = with_pool(body)
    assert served == [0, 1, 2, 3, 4] and isinstance(died, ProcessDied)


def test_more_hanging_calls_than_threads_do_not_silence_it() -> None:
    """Six were enough."""

    async def body(pool: ProcessPool) -> None:
        hanging = [asyncio.ensure_future(pool.call("run", "time.sleep(1000)")) for _ in range(6)]
        assert await pool.call("run", "7") == 7
        assert not any(call.done() for call in hanging), "it was served in the meantime"
        for call in hanging:
            with pytest.raises(CodeTimeout, match=r"took longer than 6 s \(timeout_seconds\)"):
                await call

    with_pool(body, "None", 2, timeout=6, slow_seconds=0.1, num_extra=3)


def test_slow_calls_hold_up_nobody() -> None:
    """With one process that takes one call at a time, as graders have."""
    done: list[str] = []

    async def body(pool: ProcessPool) -> None:
        async def call(name: str, expression: str) -> None:
            await pool.call("run", expression)
            done.append(name)

        slow = [call(f"slow {i}", "time.sleep(7)") for i in range(3)]
        fast = [call(f"fast {i}", "None") for i in range(20)]
        await asyncio.gather(*slow, *fast)
        assert len(pool._processes) == 1, "those that helped out have gone"

    with_pool(body, "None", 1, slow_seconds=0.2, num_extra=3)
    assert all(name.startswith("fast") for name in done[:20])


def test_a_lock_that_is_never_given_back() -> None:
    async def body(pool: ProcessPool) -> None:
        holding = asyncio.ensure_future(pool.call("run", "hold_the_lock()"))
        await asyncio.sleep(0.2)
        concurrent = asyncio.ensure_future(pool.call("run", "7"))
        with pytest.raises(CodeTimeout):
            await holding
        assert await concurrent == 7

    with_pool(body, timeout=1.5)


def test_an_async_function_that_blocks() -> None:
    async def body(pool: ProcessPool) -> None:
        with pytest.raises(CodeTimeout):
            await pool.call("block", 1000)
        assert await pool.call("run", "7") == 7

    with_pool(body, timeout=1.5)


@pytest.mark.parametrize(
    "at_start, message",
    [
        ("sys.exit(3)", "SystemExit: 3"),
        ("interrupt()", "KeyboardInterrupt: as by Ctrl-C"),
        ("os._exit(5)", "it ended its own process with exit code 5"),
        ("crash()", "its process was killed by SIGSEGV"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_at_import(at_start: str, message: str) -> None:
    async def body(pool: ProcessPool) -> None:
        raise AssertionError

    with pytest.raises(CodeError, match=message):
        with_pool(body, at_start)


@pytest.mark.parametrize("at_start", ["time.sleep(1000)", "hold_the_lock()"])
def test_an_import_that_hangs(at_start: str) -> None:
    async def body(pool: ProcessPool) -> None:
        raise AssertionError

    with pytest.raises(CodeTimeout, match=r"its import took longer than 1.5 s \(start_timeout_seconds\)"):
        with_pool(body, at_start, start=1.5)


def test_daemons_go_with_the_process(tmp_path: Path) -> None:
    """Those in a session of their own too."""
    file = tmp_path / "pids"

    async def body(pool: ProcessPool) -> None:
        await pool.call("run", f"leave_daemons({str(file)!r})")
        assert all(is_alive(int(pid)) for pid in file.read_text().split())

    with_pool(body)
    wait_until_gone(*map(int, file.read_text().split()))


def test_a_fork_bomb_ends_at_its_deadline() -> None:
    async def body(pool: ProcessPool) -> int:
        session = await pool.call("run", "os.getpid()")
        assert processes_of(session)
        with pytest.raises(CodeTimeout):
            await pool.call("run", "fork_for_ever()")
        assert await pool.call("run", "7") == 7
        return session

    assert not processes_of(with_pool(body, timeout=4))


def processes_of(session: int) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # pid (name) state parent group session
            if int(file.read_text().rpartition(")")[2].split()[3]) == session:
                found.append(str(file))
    return found


def test_memory_has_a_limit() -> None:
    async def body(pool: ProcessPool) -> None:
        with pytest.raises(ProcessDied, match=r"it used 0\.\d+ GiB of memory, more than 0\.2 GiB \(max_mem"):
            await pool.call("run", "grow(0.5)")
        assert await pool.call("run", "7") == 7

    with_pool(body, memory=0.2)


def test_the_owner_keeps_its_folder_environment_and_signals() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    before = os.getcwd()

    async def body(pool: ProcessPool) -> None:
        await pool.call("run", "ruin_the_surroundings()")
        with pytest.raises(ProcessDied):
            await pool.call("run", "os._exit(1)")
        assert await pool.call("run", "os.getcwd()") == before, "nor does the next process see any of it"

    with_pool(body)
    assert os.getcwd() == before and "RUINED" not in os.environ
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == mask


OWNER = """
import asyncio, sys
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.isolation.process import Hosted

async def main():
    async with ProcessPool(Hosted("tests.isolation.hosts:Evaluator", (), 60, 600), OutputLog("code")) as pool:
        print(await pool.call("run", "os.getpid()"), await pool.call("run", "os.getppid()"), flush=True)
        await pool.call("run", "hold_the_lock()")

asyncio.run(main())
"""


def test_nothing_outlives_an_owner_that_is_killed() -> None:
    """Not even code that holds the interpreter's lock."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=variables)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    time.sleep(0.3)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until_gone(*pids)


def test_output_goes_to_a_file_of_bounded_size_and_its_first_lines_to_the_console(tmp_path: Path) -> None:
    said: list[str] = []
    log = OutputLog("reward0", tmp_path / "logs" / "reward0.log", said.append)

    async def body(pool: ProcessPool) -> None:
        await pool.call("run", "[print(i, 'x' * 100) for i in range(200_000)] and None")

    with_pool(body, log=log)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["reward0.log", "reward0.log.1"]
    assert sum(file.stat().st_size for file in files) < 17 << 20, "of 21 million bytes"
    assert (tmp_path / "logs" / "reward0.log").read_text().endswith(f"199999 {'x' * 100}\n")
    assert said[:5] == [f"reward0: {i} {'x' * 100}" for i in range(5)]
    assert re.fullmatch(r"reward0: … 199,995 more lines in .*/logs/reward0.log", said[-1])
    assert len(said) < 15


def test_output_that_cannot_be_kept_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file")
    log = OutputLog("reward0", tmp_path / "logs" / "reward0.log")

    async def body(pool: ProcessPool) -> None:
        assert await pool.call("run", "print('x') or 7") == 7

    with_pool(body, log=log)
    assert "is not saved: cannot write" in capsys.readouterr().err


def test_a_console_that_has_gone_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def gone(text: str) -> None:
        raise RuntimeError("no such actor")

    async def body(pool: ProcessPool) -> None:
        assert await pool.call("run", "[print('x' * 100) for _ in range(10_000)] and 7") == 7

    with_pool(body, log=OutputLog("reward0", tmp_path / "reward0.log", gone))
    assert "not shown: RuntimeError('no such actor')" in capsys.readouterr().err
    assert len((tmp_path / "reward0.log").read_text().splitlines()) == 10_000
