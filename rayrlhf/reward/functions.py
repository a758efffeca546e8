"""User-defined reward functions: resolved and tried once on the driver, then called by Serve replicas; always
in a separate process.

Contract: called with keyword arguments `prompts` (as the model saw them), `responses`, `labels` and every
column of the data rows, all lists of the same length; returns a list of that length of floats, where None or
NaN means "failed", as does a number beyond ±1e18 (`items.LARGEST_REWARD`), including infinity. A function
that names its arguments gets only those. Sync or async.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import serve

from rayrlhf.config.reward_sources import FunctionLimits
from rayrlhf.isolation.frames import CodeError, ProcessDied
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.isolation.process import Hosted
from rayrlhf.placement.serve_status import failed_starts, of_this_replica
from rayrlhf.reward.items import (
    LARGEST_REWARD,
    Failure,
    RewardError,
    ScoreItem,
    checked_reward,
)
from rayrlhf.samples import Prompt
from rayrlhf.usercode import UserCode, UserCodeError, find_user_code

TIMEOUT_SHARE = 0.8  # of the request's deadline, which includes queueing, if the function has no own timeout
TRIED_RESPONSE = "A short answer, to see whether the reward function works."


def hosted_function(code: UserCode, limits: FunctionLimits, timeout_seconds: float) -> Hosted:
    """`timeout_seconds`: deadline of the caller's request."""
    return Hosted(
        "rayrlhf.reward.function_host:FunctionHost",
        (code,),
        start_timeout_seconds=limits.start_timeout_seconds,
        timeout_seconds=limits.timeout_seconds or TIMEOUT_SHARE * timeout_seconds,
        max_memory_gib=limits.max_memory_gib,
    )


def find_function(text: str, limits: FunctionLimits, timeout_seconds: float) -> UserCode:
    """Resolve `module:function` or `path/file.py:function` on the driver; import it in a subprocess. Raises
    `RewardError`.
    """
    try:
        code = find_user_code(text, "function")
    except UserCodeError as error:
        raise RewardError(str(error)) from error

    async def start() -> None:
        async with ProcessPool(hosted_function(code, limits, timeout_seconds), OutputLog(text)):
            pass

    try:
        asyncio.run(start())
    except CodeError as error:
        raise RewardError(_with_name(text, error)) from error
    return code


def arguments_for(
    prompts: Sequence[Prompt], responses: Sequence[str], label_key: str | None
) -> dict[str, list[Any]]:
    """The keyword arguments of one call, before they are narrowed to the function's signature."""
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    arguments: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in columns}
    arguments["prompts"] = [prompt.prompt for prompt in prompts]
    arguments["responses"] = list(responses)
    arguments["labels"] = [p.columns.get(label_key) if label_key else None for p in prompts]
    return arguments


def try_function(hosted: Hosted, output: OutputLog, prompts: Sequence[Prompt], label_key: str | None) -> None:
    """Call it once, with the first prompts and a fixed answer. Raises `RewardError`."""
    [code] = hosted.arguments
    arguments = arguments_for(prompts, [TRIED_RESPONSE] * len(prompts), label_key)

    async def call() -> list[float | None]:
        async with ProcessPool(hosted, output) as pool:
            return await pool.call("score", arguments, len(prompts))

    try:
        rewards = asyncio.run(call())
    except CodeError as error:
        raise RewardError(_with_name(code.text, error)) from error
    if all(reward is None for reward in rewards):
        raise RewardError(f"{code.text} returned only NaN or None, which means that scoring failed")
    for reward in rewards:
        if reward is not None and isinstance(checked := checked_reward(reward), Failure):
            raise RewardError(f"{code.text} {checked.reason}; wanted numbers up to ±{LARGEST_REWARD:g}")


def _with_name(text: str, error: CodeError) -> str:
    """The message with the function as its subject, unless it already has one."""
    reason = str(error)
    place = text.rpartition(":")[0]
    if reason.startswith(place):
        return reason
    return f"{text}{': ' if reason.startswith('it') else ' '}{reason}"


class FunctionReward:
    """Serve replica in front of the process with a user's function; CPU work, so it needs no slot."""

    async def __init__(
        self,
        hosted: Hosted,
        label_key: str | None,
        name: str,
        log: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.label_key = label_key
        self.text: str = hosted.arguments[0].text
        self.pool = ProcessPool(hosted, OutputLog(name, of_this_replica(log), say))
        try:
            await self.pool.start()
        except CodeError as error:
            raise RewardError(_with_name(self.text, error)) from error

    async def score(self, items: list[ScoreItem]) -> list[float | Failure | None]:
        """One call of the function per sample: one that is slow, raises or ends the function's process costs
        no other sample its reward.
        """
        return list(await asyncio.gather(*map(self._score_one, items)))

    async def score_together(self, items: list[ScoreItem]) -> list[float | None]:
        """One call of the function for all samples, of a request to a reward server. Raises `RewardError`."""
        prompts, responses = [item.prompt for item in items], [item.response for item in items]
        arguments = arguments_for(prompts, responses, self.label_key)
        try:
            return await self.pool.call("score", arguments, len(items))
        except CodeError as error:
            raise RewardError(_with_name(self.text, error)) from error

    async def _score_one(self, item: ScoreItem) -> float | Failure | None:
        arguments = arguments_for([item.prompt], [item.response], self.label_key)
        try:
            [reward] = await self.pool.call("score", arguments, 1)
        except CodeError as error:
            # Asked again, a sample that ends the process would cost another one.
            return Failure(_with_name(self.text, error), final=isinstance(error, ProcessDied))
        return reward

    def __del__(self) -> None:  # Serve calls it when the replica ends
        if hasattr(self, "pool"):
            self.pool.close()


def function_deployment(
    hosted: Hosted,
    *,
    label_key: str | None,
    num_replicas: int,
    name: str,
    log: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    deployment = serve.deployment(FunctionReward).options(
        name="reward",
        num_replicas=num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(num_replicas),
    )
    return deployment.bind(hosted, label_key, name, log, say)
