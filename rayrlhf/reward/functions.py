"""Reward functions of the user's: found, tried once on the driver, then run by Serve replicas.

The contract: called with keyword arguments `prompts` (as the model saw them), `responses`, `labels` and every
column of the data rows, all lists of one length; returns a list of that length of floats, where None or NaN
means "failed". So does a number beyond ±1e18 (`items.LARGEST_REWARD`), infinity among them. A
function that names its arguments gets only those. Sync or async.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve

from rayrlhf.reward.items import LARGEST_REWARD, Failure, RewardError, ScoreItem, checked_reward
from rayrlhf.samples import Prompt
from rayrlhf.usercode import UserCode, UserCodeError, find_user_code

RewardFunction = Callable[..., Any]


def find_function(text: str) -> UserCode:
    """Resolve `module:function` or `path/file.py:function` on the driver. Raises `RewardError`."""
    try:
        return find_user_code(text, "function")
    except UserCodeError as error:
        raise RewardError(str(error)) from error


def arguments_for(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    label_key: str | None,
) -> dict[str, list[Any]]:
    """The keyword arguments of one call, narrowed to those the function names."""
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    arguments: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in columns}
    arguments["prompts"] = [prompt.prompt for prompt in prompts]
    arguments["responses"] = list(responses)
    arguments["labels"] = [p.columns.get(label_key) if label_key else None for p in prompts]
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: values for name, values in arguments.items() if name in parameters}


async def call_function(
    function: RewardFunction, arguments: dict[str, list[Any]], count: int
) -> list[float | None]:
    """Call it and hold it to the contract; NaN becomes None. Raises `RewardError` on a broken one."""
    if inspect.iscoroutinefunction(function):
        returned = await function(**arguments)
    else:
        returned = await asyncio.to_thread(function, **arguments)
    try:
        rewards = [None if value is None or math.isnan(float(value)) else float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise RewardError(f"returned {returned!r:.200}; a list of {count} floats was wanted") from error
    if len(rewards) != count:
        raise RewardError(f"returned {len(rewards)} rewards for {count} responses")
    return rewards


def try_function(code: UserCode, prompts: Sequence[Prompt], label_key: str | None) -> None:
    """Call it once, with the first prompts and a plain answer. Raises `RewardError`."""
    function = code.load()
    responses = ["A short answer, to see whether the reward function works."] * len(prompts)
    arguments = arguments_for(function, prompts, responses, label_key)
    try:
        rewards = asyncio.run(call_function(function, arguments, len(prompts)))
    except RewardError as error:
        raise RewardError(f"{code.text} {error}") from error
    except Exception as error:
        raise RewardError(
            f"{code.text} raised {type(error).__name__}: {error} when called with {', '.join(arguments)}"
        ) from error
    if all(reward is None for reward in rewards):
        raise RewardError(f"{code.text} returned only NaN or None, which means that scoring failed")
    for reward in rewards:
        if reward is not None and isinstance(checked := checked_reward(reward), Failure):
            raise RewardError(f"{code.text} {checked.reason}; wanted numbers up to ±{LARGEST_REWARD:g}")


class FunctionReward:
    """The Serve replica that runs a user's function; CPU work, so it has no slot."""

    def __init__(self, code: UserCode, label_key: str | None) -> None:
        self.function = code.load()
        self.label_key = label_key

    async def score(self, items: list[ScoreItem]) -> list[float | None]:
        """One call of the function per request: a user's function that raises fails no other request."""
        prompts, responses = [item.prompt for item in items], [item.response for item in items]
        arguments = arguments_for(self.function, prompts, responses, self.label_key)
        return await call_function(self.function, arguments, len(items))


def function_deployment(code: UserCode, *, label_key: str | None, num_replicas: int) -> Any:
    deployment = serve.deployment(FunctionReward).options(
        name="reward",
        num_replicas=num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(code, label_key)
