"""Request loop of the subprocess that runs user code: one host object whose methods are called remotely.

The first frame, `(host, arguments)`, names a class of rayrlhf, `module:Class`. It is created on the main
thread, which some imports require. Its methods are coroutines and run concurrently on one loop; they run
blocking calls on a thread. `exit()` and Ctrl-C's exception end the call that raised them, not the process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NoReturn

from rayrlhf.isolation.frames import HEADER, CodeError, described, encoded

PING = ""  # the method that only checks that the loop runs
READY = 0  # id of the first answer: the host is ready, or why it is not


def run(request_fd: int, answer_fd: int) -> NoReturn:
    """Serve requests until the pipe is closed."""
    faulthandler.enable()
    requests = os.fdopen(request_fd, "rb", buffering=0)
    try:
        name, arguments = pickle.loads(_read(requests))
        module, _, made = name.partition(":")
        host = getattr(importlib.import_module(module), made)(*arguments)
        max_calls: int = host.max_calls
    except BaseException as error:  # also exit() at import
        _write(answer_fd, encoded({"id": READY, "error": _reason(error)}))
        os._exit(0)
    _write(answer_fd, encoded({"id": READY, "result": [max_calls, os.getpid()]}))
    try:
        asyncio.run(_serve(host, requests, answer_fd))
    finally:
        os._exit(0)  # threads of user code may still run


async def _serve(host: Any, requests: BinaryIO, answer_fd: int) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(host.max_calls))
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)
    running: set[asyncio.Task[None]] = set()
    while True:
        try:
            [length] = HEADER.unpack(await reader.readexactly(HEADER.size))
            request = pickle.loads(await reader.readexactly(length))
        except asyncio.IncompleteReadError:  # the owner has closed it
            return
        task = asyncio.ensure_future(_answer(host, answer_fd, *request))
        running.add(task)
        task.add_done_callback(running.discard)


async def _answer(host: Any, answer_fd: int, number: int, method: str, arguments: tuple[Any, ...]) -> None:
    try:
        result = None if method == PING else await getattr(host, method)(*arguments)
        answer = encoded({"id": number, "result": result})
    except BaseException as error:
        answer = encoded({"id": number, "error": _reason(error)})
    _write(answer_fd, answer)


def _reason(error: BaseException) -> str:
    if isinstance(error, CodeError):
        return str(error)
    return described(error, (__file__,))


def _read(file: BinaryIO) -> bytes:
    [length] = HEADER.unpack(_exactly(file, HEADER.size))
    return _exactly(file, length)


def _exactly(file: BinaryIO, count: int) -> bytes:
    received = b""
    while len(received) < count:
        part = file.read(count - len(received))
        if not part:
            os._exit(0)  # the owner has ended
        received += part
    return received


def _write(fd: int, content: bytes) -> None:
    """Write all bytes. Only the loop's thread writes, so frames do not interleave."""
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        os._exit(0)
