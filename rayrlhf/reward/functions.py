"""Reward functions of the user's: found, tried once on the driver, then run by Serve replicas.

The contract: called with keyword arguments `prompts` (as the model saw them), `responses`, `labels` and every
column of the data rows, all lists of one length; returns a list of that length of floats, where None or NaN
means "failed". A function that names its arguments gets only those. Sync or async.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import serve

from rayrlhf.batch import Prompt

RewardFunction = Callable[..., Any]


class RewardError(ValueError):
    """A reward function that cannot be found or breaks the contract."""


@dataclass(frozen=True)
class FunctionSpec:
    """A reward function that can travel: a file is carried along as text, since other nodes may not have
    it.
    """

    text: str  # as in the config
    file_source: str | None  # the file's content, for path/file.py:function

    @property
    def place(self) -> str:
        return self.text.rpartition(":")[0]

    @property
    def name(self) -> str:
        return self.text.rpartition(":")[2]

    def load(self) -> RewardFunction:
        """Raises `RewardError` that says what was not found."""
        module = _import(self.place) if self.file_source is None else _run_file(self.place, self.file_source)
        function = getattr(module, self.name, None)
        if not callable(function):
            public = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and name[0] != "_"}
            own = sorted(name for name, f in public.items() if f.__module__ == module.__name__)
            raise RewardError(
                f"{self.place} has no function {self.name!r}; it has: {', '.join(own) or 'none'}"
            )
        return function


def find_function(text: str) -> FunctionSpec:
    """Resolve `module:function` or `path/file.py:function` on the driver. Raises `RewardError`."""
    spec = FunctionSpec(text, None)
    if not spec.place or not spec.name:
        raise RewardError(f"{text!r} is not of the form module:function or path/file.py:function")
    if spec.place.endswith(".py"):
        path = Path(spec.place)
        if not path.is_file():
            raise RewardError(f"{path} is not a file (looked from {Path.cwd()})")
        spec = FunctionSpec(text, path.read_text())
    spec.load()
    return spec


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RewardError(
            f"cannot import {name!r} ({error}); is it on PYTHONPATH, or did you mean a .py file?"
        ) from error
    except Exception as error:
        raise RewardError(f"{name} fails at import: {type(error).__name__}: {error}") from error


def _run_file(path: str, source: str) -> ModuleType:
    module = ModuleType(f"reward_file_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        raise RewardError(f"{path} fails at import: {type(error).__name__}: {error}") from error
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


def try_function(spec: FunctionSpec, prompts: Sequence[Prompt], label_key: str | None) -> None:
    """Call it once, with the first prompts and a plain answer. Raises `RewardError`."""
    function = spec.load()
    responses = ["A short answer, to see whether the reward function works."] * len(prompts)
    arguments = arguments_for(function, prompts, responses, label_key)
    try:
        rewards = asyncio.run(call_function(function, arguments, len(prompts)))
    except RewardError as error:
        raise RewardError(f"{spec.text} {error}") from error
    except Exception as error:
        raise RewardError(
            f"{spec.text} raised {type(error).__name__}: {error} when called with {', '.join(arguments)}"
        ) from error
    if all(reward is None for reward in rewards):
        raise RewardError(f"{spec.text} returned only NaN or None, which means that scoring failed")


class FunctionReward:
    """The Serve replica that runs a user's function; CPU work, so it has no slot."""

    def __init__(self, spec: FunctionSpec, label_key: str | None) -> None:
        self.function = spec.load()
        self.label_key = label_key

    async def score(self, prompts: list[Prompt], responses: list[str], _token_ids: Any) -> list[float | None]:
        arguments = arguments_for(self.function, prompts, responses, self.label_key)
        return await call_function(self.function, arguments, len(prompts))


def function_deployment(spec: FunctionSpec, *, label_key: str | None, num_replicas: int) -> Any:
    deployment = serve.deployment(FunctionReward).options(
        name="reward",
        num_replicas=num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(spec, label_key)
