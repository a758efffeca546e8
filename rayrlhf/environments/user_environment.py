"""Interface of user environments, and a wrapper that validates the calls to one instance. It runs in a
separate process (see `environment_host`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from rayrlhf.isolation.frames import described

if TYPE_CHECKING:
    from rayrlhf.environments.chat_tokens import Message, Observation

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
MESSAGE_CHARACTERS = 2_000  # of the message of an exception in user code


class Environment(Protocol):
    """Interface of a class given as `rollout.environment.environment`; no inheritance is required.

    Each episode has a separate instance, created with `rollout.environment.arguments`. Either method may be
    `async def`. Plain methods run on a thread, the same one for the whole episode, and may block; async ones
    share an event loop with other episodes and must not block. Randomness should be derived from the row: the
    samples of a group are compared with one another and should have the same task. A method `close()` is
    called at the end, if there is one.
    """

    def reset(self, row: dict[str, Any]) -> str | Sequence[Message]:
        """Start an episode.

        Args:
            row: the columns of the data.

        Returns:
            The opening messages. A text is one user message, or with data.apply_chat_template=false the
            prompt itself.
        """
        ...

    def step(self, response: str) -> tuple[Observation, float, bool]:
        """Process one response of the policy.

        Args:
            response: text without special tokens.

        Returns:
            (observation, reward, done). The observation is a text (a user message), a message such as
            {"role": "tool", "content": "42"}, or a list of them; it is ignored when done. The episode's
            reward is the sum over its steps.
        """
        ...


class EnvironmentFailure(ValueError):
    """The environment raised, violated the interface or timed out: its episode has no reward."""


class UserEnvironment:
    """One episode's instance of the user's class. Its methods raise `EnvironmentFailure`."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.make = make
        self.arguments = arguments
        self.running = ""  # the user method that is running
        self._instance: Any = None
        self._thread = _EpisodeThread()

    async def reset(self, row: dict[str, Any]) -> str | Sequence[Message]:
        self._instance = await self._call("__init__", lambda: self.make(**self.arguments))
        return await self._call("reset", self._instance.reset, row)

    async def step(self, response: str) -> tuple[Observation, float, bool]:
        returned = await self._call("step", self._instance.step, response)
        try:
            observation, reward, done = returned
        except (TypeError, ValueError) as error:
            raise EnvironmentFailure(
                f"step() returned {returned!r:.200}; (observation, reward, done) was wanted"
            ) from error
        try:
            number = float(reward)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise EnvironmentFailure(f"step() returned the reward {reward!r:.50}; a finite number was wanted")
        if done not in (True, False):
            raise EnvironmentFailure(f"step() returned done={done!r:.50}; True or False was wanted")
        return observation, number, bool(done)

    async def close(self) -> None:
        """Call the user's `close`. Its errors are only logged: the episode is already over."""
        close = getattr(self._instance, "close", None)
        try:
            if close is not None and not self._thread.busy:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._call("close", close)
        except EnvironmentFailure as error:
            logger.warning("environment: %s", error)
        except TimeoutError:
            logger.warning("environment: close() took more than %g s", CLOSE_SECONDS)
        finally:
            self._thread.end()

    @property
    def stuck_thread(self) -> threading.Thread | None:
        """The thread, if a user call is still running on it."""
        return self._thread.thread if self._thread.busy else None

    async def _call(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        self.running = f"{name}()"
        try:
            if inspect.iscoroutinefunction(method):
                returned = await _await_abandonable(method(*arguments))
            else:
                returned, error = await self._thread.run(method, *arguments)
                if error is not None:
                    raise error
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # user code: exit() must end only the episode
            raise EnvironmentFailure(f"{name}() raised {described(error, (__file__,))}") from error
        self.running = ""
        return returned


class _EpisodeThread:
    """Runs calls sequentially, on a daemon thread: a call that never returns blocks only this thread."""

    def __init__(self) -> None:
        self.busy = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="environment")
        self.thread.start()

    async def run(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None]:
        """Returns (result, error): futures and coroutines cannot propagate StopIteration, for example."""
        future: Future[tuple[Any, BaseException | None]] = Future()
        self._calls.put((future, function, arguments))
        return await asyncio.wrap_future(future)

    def end(self) -> None:
        """Stop the thread after the current call."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if not future.set_running_or_notify_cancel():
                continue
            self.busy = True
            try:
                outcome = function(*arguments), None
            except BaseException as error:
                outcome = None, error
            self.busy = False
            future.set_result(outcome)


async def _await_abandonable(coroutine: Any) -> Any:
    """Await a coroutine; on cancellation, cancel it without waiting for it to end."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
    if task.cancelled():
        raise RuntimeError("the coroutine cancelled itself")
    return task.result()
