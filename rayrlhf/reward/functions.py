"""Reward functions of the user's: found, tried once on the driver, then run by Serve replicas.

The contract: called with keyword arguments `prompts` (as the model saw them), `responses`, `labels` and every column
of the data rows, all lists of one length; returns a list of that length of floats, where None or NaN means "failed".
A function that names its arguments gets only those. Sync or async.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
from ray import serve

from rayrlhf.batch import Prompt

RewardFunction = Callable[..., Any]


class RewardError(ValueError):
    """A reward function that cannot be found or breaks the contract."""


def load_function(spec: str) -> RewardFunction:
    """Resolve `module:function` or `path/file.py:function`. Raises `RewardError` that names what was not found."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise RewardError(f"{spec!r} is not of the form module:function or path/file.py:function")
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        public = sorted(n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_"))
        raise RewardError(f"{place} has no function {name!r}; it has: {', '.join(public) or 'none'}")
    return function


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RewardError(f"cannot import {name!r} ({error}); is it on PYTHONPATH, or did you mean a .py file?") from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise RewardError(f"{path} is not a file (looked from {Path.cwd()})")
    name = f"rayrlhf_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"{path} fails at import: {type(error).__name__}: {error}") from error
    # The file need not exist on other nodes: the function travels there as code.
    cloudpickle.register_pickle_by_value(module)
    return module


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


async def call_function(function: RewardFunction, arguments: dict[str, list[Any]], count: int) -> list[float | None]:
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


def try_function(spec: str, prompts: Sequence[Prompt], label_key: str | None) -> RewardFunction:
    """Resolve the function and call it once, with the first prompts and a plain answer. Raises `RewardError`."""
    function = load_function(spec)
    responses = ["A short answer, to see whether the reward function works."] * len(prompts)
    arguments = arguments_for(function, prompts, responses, label_key)
    try:
        rewards = asyncio.run(call_function(function, arguments, len(prompts)))
    except RewardError as error:
        raise RewardError(f"{spec} {error}") from error
    except Exception as error:
        raise RewardError(
            f"{spec} raised {type(error).__name__}: {error} when called with {', '.join(arguments)}"
        ) from error
    if all(reward is None for reward in rewards):
        raise RewardError(f"{spec} returned only NaN or None, which means that scoring failed")
    return function


class FunctionReward:
    """The Serve replica that runs a user's function; CPU work, so it has no slot."""

    def __init__(self, function: bytes, label_key: str | None) -> None:
        self.function: RewardFunction = cloudpickle.loads(function)
        self.label_key = label_key

    async def score(self, prompts: list[Prompt], responses: list[str], _token_ids: Any) -> list[float | None]:
        arguments = arguments_for(self.function, prompts, responses, self.label_key)
        return await call_function(self.function, arguments, len(prompts))


def function_deployment(function: RewardFunction, *, label_key: str | None, num_replicas: int) -> Any:
    deployment = serve.deployment(FunctionReward).options(
        name="reward",
        num_replicas=num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(cloudpickle.dumps(function), label_key)
