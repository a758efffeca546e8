"""A second process for steps about two processes on one device."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Self

SECONDS = 120.0  # to start, or to answer


class PeerFailed(Exception):
    pass


class Peer:
    """An object in another process, whose methods are called from here.

    with Peer(Reader, device) as reader:
        reader.ask("attach", handle)
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            make: a function or class of a module, called in the other process with `arguments`.
            environment: variables of that process, which torch may read when it is imported.
        """
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _environment(environment or {}):  # inherited: the process imports torch before it runs anything
            self.process.start()
        theirs.close()

    def start(self, method: str, *arguments: Any) -> None:
        self.connection.send((method, arguments))

    def answer(self, seconds: float = SECONDS) -> Any:
        if not self.connection.poll(seconds):
            raise PeerFailed(f"no answer within {seconds:g} s")
        try:
            is_answer, value = self.connection.recv()
        except (EOFError, ConnectionError):  # the latter if it had not read all
            self.process.join(5)
            raise PeerFailed(f"the other process died, exit status {self.process.exitcode}") from None
        if not is_answer:
            raise PeerFailed(f"in the other process:\n{value}")
        return value

    def ask(self, method: str, *arguments: Any) -> Any:
        self.start(method, *arguments)
        return self.answer()

    def __enter__(self) -> Self:
        try:
            self.answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()  # it ends
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    target: Any = None
    try:
        target = make(*arguments)
        connection.send((True, None))
        while True:
            method, given = connection.recv()
            connection.send((True, getattr(target, method)(*given)))
    except EOFError:
        status = 0
    except Exception:
        connection.send((False, traceback.format_exc()))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's finalisation: a pool of a pluggable allocator aborts in it
    # (https://github.com/pytorch/pytorch/issues/145168).
    os._exit(status)
