"""Host of a user's reward function in its subprocess: calls it and checks the contract."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from rayrlhf.isolation.frames import CodeError, described
from rayrlhf.reward.items import RewardError
from rayrlhf.usercode import UserCode, UserCodeError

RewardFunction = Callable[..., Any]

MAX_THREADS = 32  # concurrent calls of a plain function
MAX_COROUTINES = 256  # concurrent calls of an async function


class FunctionHost:
    """Run by `rayrlhf.isolation.host`. Raises `CodeError` if there is no such function."""

    def __init__(self, code: UserCode) -> None:
        try:
            self.function = code.load()
        except UserCodeError as error:
            raise CodeError(str(error)) from error
        self.max_calls = MAX_COROUTINES if inspect.iscoroutinefunction(self.function) else MAX_THREADS

    async def score(self, arguments: dict[str, list[Any]], count: int) -> list[float | None]:
        """Raises `CodeError` for any exception of the function."""
        narrowed = narrow(self.function, arguments)
        try:
            return await call_function(self.function, narrowed, count)
        except RewardError as error:
            raise CodeError(str(error)) from error
        except BaseException as error:  # including exit(): it ends only this call
            reason = described(error, (__file__,))
            raise CodeError(f"raised {reason} when called with {', '.join(narrowed)}") from error


def narrow(function: RewardFunction, arguments: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The keyword arguments in the function's signature; all, if it takes **kwargs."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: values for name, values in arguments.items() if name in parameters}


async def call_function(
    function: RewardFunction, arguments: dict[str, list[Any]], count: int
) -> list[float | None]:
    """Call it and check the contract; NaN becomes None. Raises `RewardError` on a violation."""
    if inspect.iscoroutinefunction(function):
        returned = await function(**arguments)
    else:
        returned, error = await asyncio.to_thread(_outcome, function, arguments)
        if error is not None:
            raise error
    try:
        values = list(islice(returned, count + 1))
        rewards = [None if value is None or math.isnan(float(value)) else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RewardError(f"returned {returned!r:.200}; wanted a list of {count} floats") from error
    if len(rewards) != count:
        number = len(returned) if hasattr(returned, "__len__") else len(rewards)  # at most count + 1
        raise RewardError(f"returned {number} rewards for {count} responses")
    return rewards


def _outcome(function: RewardFunction, arguments: dict[str, list[Any]]) -> tuple[Any, BaseException | None]:
    """(result, error): a future cannot carry every exception, such as StopIteration."""
    try:
        return function(**arguments), None
    except BaseException as error:
        return None, error
