"""The user's side of an episode: an instance of their class, its calls held to a contract. It lives in a
process of its own (see `environment_host`).
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
MESSAGE_CHARACTERS = 2_000  # of what the user's code raised


class Environment(Protocol):
    """What a class must have to be `rollout.environment.environment`; there is nothing to inherit from.

    Each episode has an instance of its own, made with `rollout.environment.arguments`. Either method may be
    `async def`. Plain ones run on a thread, the same one for the whole episode, and may take their time;
    async ones share a loop with other episodes and must not block. What is random in it should come from the
    row: the samples of a group are compared with one another and should meet the same task. A method
    `close()` is called at the end, if there is one.
    """

    def reset(self, row: dict[str, Any]) -> str | Sequence[Message]:
        """The messages that open the episode (a text is one message of the user's, or the prompt itself
        with data.apply_chat_template=false). `row` has the columns of the data.
        """
        ...

    def step(self, response: str) -> tuple[Observation, float, bool]:
        """(observation, reward, done) after a response of the policy, given without special tokens.

        The observation is a text (a message of the user's), a message such as {"role": "tool", "content":
        "42"}, or a list of them; it is not looked at when done. The episode's reward is the sum over its
        steps.
        """
        ...


class EnvironmentFailure(ValueError):
    """The environment raised, broke the contract or took too long: its episode has no reward."""


class UserEnvironment:
    """One episode's instance of the user's class. Its methods raise `EnvironmentFailure`."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.make = make
        self.arguments = arguments
        self.running = ""  # the user's method that runs now
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
        """Let the user's class clean up. What goes wrong here is logged: the episode itself is over."""
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
        """The thread, if a call of the user's still runs on it."""
        return self._thread.thread if self._thread.busy else None

    async def _call(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        self.running = f"{name}()"
        try:
            if inspect.iscoroutinefunction(method):
                returned = await _let_go_of(method(*arguments))
            else:
                returned, error = await self._thread.run(method, *arguments)
                if error is not None:
                    raise error
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # foreign code: exit() ends the episode and nothing else
            raise EnvironmentFailure(f"{name}() raised {described(error, (__file__,))}") from error
        self.running = ""
        return returned


class _EpisodeThread:
    """Runs one call after the other. A daemon: a call that never returns holds up nothing but itself."""

    def __init__(self) -> None:
        self.busy = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="environment")
        self.thread.start()

    async def run(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None]:
        """(result, error). Neither futures nor coroutines let every exception pass: not StopIteration."""
        future: Future[tuple[Any, BaseException | None]] = Future()
        self._calls.put((future, function, arguments))
        return await asyncio.wrap_future(future)

    def end(self) -> None:
        """Leave after the call that runs now."""
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


async def _let_go_of(coroutine: Any) -> Any:
    """Await it; when cancelled, cancel it too, but do not wait for whether it heeds that."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
    if task.cancelled():
        raise RuntimeError("the coroutine cancelled itself")
    return task.result()
