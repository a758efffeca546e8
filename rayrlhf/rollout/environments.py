"""Multi-turn rollouts: Serve replicas that play episodes between the engines and an environment of the
user's.

Environments are found and tried once on the driver; the replicas need no slot, only time on a CPU.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.environment import EnvironmentConfig
from rayrlhf.config.rollout import RolloutConfig
from rayrlhf.data.chat import prompt_tokenizer
from rayrlhf.rollout.client import Patience
from rayrlhf.rollout.engine import Generation
from rayrlhf.rollout.episodes import Episode, play
from rayrlhf.rollout.turns import Turns
from rayrlhf.rollout.user_environment import EnvironmentFailure, UserEnvironment
from rayrlhf.samples import Prompt
from rayrlhf.usercode import UserCode, UserCodeError, find_user_code

MAX_EPISODES = 1024  # at once, per replica
MAX_STUCK_THREADS = 64  # calls of the user's that never came back, before a replica is restarted
DUMMY_ANSWER = "A short answer, to see whether the environment works."
DUMMY_PARAMS = {"max_tokens": 10_000, "seed": 0}


def find_environment(text: str) -> UserCode:
    """Resolve `rollout.environment.environment` on the driver. Raises `UserCodeError`."""
    code = find_user_code(text, "class")
    environment = code.load()
    missing = [name for name in ("reset", "step") if not callable(getattr(environment, name, None))]
    if missing:
        raise UserCodeError(
            f"{text} has no method {' and no method '.join(missing)}; wanted reset(row) and step(response)"
        )
    return code


def try_environment(
    code: UserCode, config: EnvironmentConfig, rows: Sequence[Mapping[str, Any]], turns: Turns
) -> None:
    """Play two turns with a plain answer for each of `rows`. Raises `EnvironmentFailure`."""
    two_turns = config.model_copy(update={"max_turns": 2})  # the first observation is rendered too
    make = code.load()

    async def answer(prompt_ids: list[int], params: dict[str, Any]) -> Generation:
        ids: list[int] = turns.tokenizer(DUMMY_ANSWER, add_special_tokens=False).input_ids
        if turns.end_of_turn_id is not None:
            ids = [*ids, turns.end_of_turn_id]
        return Generation(ids, DUMMY_ANSWER, [0.0] * len(ids), False, [0] * len(ids))

    for row in rows:
        environment = UserEnvironment(make, config.arguments)
        episode = asyncio.run(play(environment, turns, two_turns, row, DUMMY_PARAMS, answer))
        if episode.failure:
            raise EnvironmentFailure(f"{code.text}: {episode.failure}; tried with the row {dict(row)!r:.200}")


@dataclass(frozen=True)
class EnvironmentSetup:
    """What a replica needs to play."""

    code: UserCode
    rollout: RolloutConfig  # with `environment`
    data: PromptDataConfig
    tokenizer_path: str
    trust_remote_code: bool
    chat_template: str | None  # Jinja text
    rollout_app: str  # the engines' Serve app


class EnvironmentReplica:
    """Plays episodes, many at once. A failed environment is part of its episode, never an exception."""

    def __init__(self, setup: EnvironmentSetup) -> None:
        assert setup.rollout.environment is not None
        self.setup = setup
        self.config = setup.rollout.environment
        self.make = setup.code.load()
        tokenizer = prompt_tokenizer(setup.tokenizer_path, setup.trust_remote_code, setup.chat_template)
        self.turns = Turns(tokenizer, setup.data)
        self.stuck: list[threading.Thread] = []
        self._engines: Any = None

    async def episode(self, prompt: Prompt, params: dict[str, Any], min_version: int) -> Episode:
        """An episode for the columns of a row. `params` are vLLM's SamplingParams; every turn derives a seed
        of its own from theirs. Each response is sampled by weights of at least `min_version`.
        """
        environment = UserEnvironment(self.make, self.config.arguments)

        async def complete(prompt_ids: list[int], params: dict[str, Any]) -> Generation:
            return await self._complete(prompt_ids, params, min_version)

        try:
            return await play(environment, self.turns, self.config, prompt.columns, params, complete)
        finally:
            if environment.stuck_thread is not None:
                self.stuck.append(environment.stuck_thread)

    async def _complete(self, prompt_ids: list[int], params: dict[str, Any], min_version: int) -> Generation:
        """One response from the engines; from another one if the first dies."""
        patience = Patience("engine", "rollout.timeout_seconds", self.setup.rollout.timeout_seconds)
        if self._engines is None:  # not in the constructor: the engines' app may come up later
            self._engines = serve.get_app_handle(self.setup.rollout_app)
        return await patience.ask(lambda: self._engines.complete.remote(prompt_ids, params, min_version))

    async def num_stuck(self) -> int:
        """Calls of the user's that never came back, and still run."""
        self.stuck = [thread for thread in self.stuck if thread.is_alive()]
        return len(self.stuck)

    async def check_health(self) -> None:
        """Too many abandoned threads slow the others down: a new process has none."""
        if await self.num_stuck() > MAX_STUCK_THREADS:
            raise RuntimeError(f"{len(self.stuck)} calls of {self.setup.code.text} never came back")


def environment_deployment(setup: EnvironmentSetup) -> Any:
    """The bound deployment for `serve.run`."""
    assert setup.rollout.environment is not None
    deployment = serve.deployment(EnvironmentReplica).options(
        name="environment",
        num_replicas=setup.rollout.environment.num_replicas,
        max_ongoing_requests=MAX_EPISODES,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=2,
    )
    return deployment.bind(setup)
