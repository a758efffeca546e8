"""Runs user environments inside an isolated process: one instance per episode."""

from __future__ import annotations

import asyncio
from typing import Any

from rayrlhf.environments.user_environment import EnvironmentFailure, UserEnvironment
from rayrlhf.isolation.frames import CodeError
from rayrlhf.usercode import UserCode, UserCodeError

MAX_EPISODES = 1024  # concurrent, per process


class EnvironmentHost:
    """Run by `rayrlhf.isolation.host`. Raises `CodeError` if the class cannot be used."""

    max_calls = MAX_EPISODES

    def __init__(self, code: UserCode, arguments: dict[str, Any]) -> None:
        try:
            self.make = code.load()
        except UserCodeError as error:
            raise CodeError(str(error)) from error
        self.arguments = arguments
        self.episodes: dict[int, UserEnvironment] = {}
        self.running: dict[int, asyncio.Task[Any]] = {}
        missing = [name for name in ("reset", "step") if not callable(getattr(self.make, name, None))]
        if missing:
            raise CodeError(
                f"{code.text} has no method {' and no method '.join(missing)}; "
                "wanted reset(row) and step(response)"
            )

    async def reset(self, episode: int, row: dict[str, Any]) -> Any:
        self.episodes[episode] = UserEnvironment(self.make, self.arguments)
        return await self._call(episode, self.episodes[episode].reset(row))

    async def step(self, episode: int, response: str) -> Any:
        return await self._call(episode, self.episodes[episode].step(response))

    async def close(self, episode: int) -> bool:
        """Close the environment. Returns whether a user call is stuck, that is, still running."""
        environment = self.episodes.pop(episode, None)
        if environment is None:
            return False
        if (running := self.running.get(episode)) is not None:
            running.cancel()
        await environment.close()
        return environment.stuck_thread is not None

    async def _call(self, episode: int, work: Any) -> Any:
        task = self.running[episode] = asyncio.ensure_future(work)
        try:
            return await task
        except EnvironmentFailure as error:
            raise CodeError(str(error)) from error
        finally:
            del self.running[episode]
