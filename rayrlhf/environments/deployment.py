"""Environment deployment for multi-turn rollouts: Serve replicas that run episodes between the engines and a
user-defined environment.

Environments are resolved and tried once on the driver; the replicas need no slot, only CPU time.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ray import serve

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.rollout import EnvironmentConfig, RolloutConfig
from rayrlhf.data.chat import prompt_tokenizer
from rayrlhf.environments.chat_tokens import Message, Observation, Turns
from rayrlhf.environments.environment_host import MAX_EPISODES
from rayrlhf.environments.episode import Episode, play
from rayrlhf.environments.user_environment import CLOSE_SECONDS, EnvironmentFailure
from rayrlhf.isolation.frames import CodeError, CodeTimeout, ProcessDied
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.isolation.process import CodeProcess, Hosted
from rayrlhf.placement.serve_status import failed_starts, of_this_replica
from rayrlhf.rollout.client import RetryPolicy
from rayrlhf.rollout.engine import Generation
from rayrlhf.samples import Prompt
from rayrlhf.usercode import UserCode, UserCodeError, find_user_code

MAX_STUCK_CALLS = 8  # of user code that never returned, before their process is replaced
NAME = "environment"  # of its output log
DUMMY_ANSWER = "A short answer, to see whether the environment works."
DUMMY_PARAMS = {"max_tokens": 10_000, "seed": 0}


def hosted_environment(code: UserCode, config: EnvironmentConfig) -> Hosted:
    return Hosted(
        "rayrlhf.environments.environment_host:EnvironmentHost",
        (code, config.arguments),
        start_timeout_seconds=config.start_timeout_seconds,
        timeout_seconds=config.timeout_seconds,
        max_memory_gib=config.max_memory_gib,
    )


def find_environment(config: EnvironmentConfig) -> UserCode:
    """Resolve `module:Class` or `path/file.py:Class` on the driver, and import it in a separate process.

    Raises:
        UserCodeError: if the class cannot be found, imported or used.
    """
    code = find_user_code(config.environment, "class")

    async def start() -> None:
        async with ProcessPool(hosted_environment(code, config), OutputLog(NAME)):
            pass

    try:
        asyncio.run(start())
    except CodeError as error:
        raise UserCodeError(_with_name(code.text, error)) from error
    return code


def _with_name(text: str, error: CodeError) -> str:
    reason = str(error)
    return reason if reason.startswith(text.rpartition(":")[0]) else f"{text}: {reason}"


class IsolatedEnvironments:
    """Environments in separate processes, with the interface that `play` expects."""

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool
        self._numbers = count()
        self._stuck: dict[CodeProcess, int] = {}

    @asynccontextmanager
    async def episode(self, *, own_process: bool = False) -> AsyncIterator[IsolatedEnvironment]:
        """An environment for one episode.

        Args:
            own_process: use a separate process, not shared with other episodes.

        Raises:
            EnvironmentFailure: if no process starts.
        """
        try:
            async with self.pool.own_process() if own_process else self.pool.process() as process:
                yield IsolatedEnvironment(self, process, next(self._numbers))
        except CodeError as error:
            raise EnvironmentFailure(str(error)) from error

    async def count_stuck(self, process: CodeProcess) -> None:
        """Replace a process with too many calls that never end: they slow down the others."""
        self._stuck[process] = self._stuck.get(process, 0) + 1
        if self._stuck[process] >= MAX_STUCK_CALLS:
            del self._stuck[process]
            await self.pool.retire(process)


class IsolatedEnvironment:
    """The environment of one episode, in another process. Its methods raise `EnvironmentFailure`."""

    def __init__(self, owner: IsolatedEnvironments, process: CodeProcess, number: int) -> None:
        self.owner = owner
        self.process = process
        self.number = number
        self.running = ""  # the user method that is running
        self.may_retry = False  # its process died while other episodes ran in it, perhaps because of them

    async def reset(self, row: dict[str, Any]) -> str | Sequence[Message]:
        return await self._call("reset", row)

    async def step(self, response: str) -> tuple[Observation, float, bool]:
        observation, reward, done = await self._call("step", response)
        return observation, reward, done

    async def close(self) -> None:
        if self.process.died:
            return
        try:
            # The process itself limits the time of the user's close().
            is_stuck = await self.process.call("close", self.number, timeout_seconds=CLOSE_SECONDS + 5)
        except CodeTimeout:
            await self.owner.pool.retire(self.process)
        except ProcessDied:
            pass  # the episode is already over
        else:
            if is_stuck:
                await self.owner.count_stuck(self.process)

    async def _call(self, method: str, argument: Any) -> Any:
        self.running = f"{method}()"
        try:
            returned = await self.process.call(method, self.number, argument)
        except ProcessDied as died:
            self.may_retry = not died.alone
            raise EnvironmentFailure(f"{method}(): {died}") from died
        except CodeError as error:
            raise EnvironmentFailure(str(error)) from error
        self.running = ""
        return returned


def try_environment(
    hosted: Hosted,
    output: OutputLog,
    config: EnvironmentConfig,
    rows: Sequence[Mapping[str, Any]],
    turns: Turns,
) -> None:
    """Run two turns with a fixed answer for each of `rows`. Raises `EnvironmentFailure`."""
    two_turns = config.model_copy(update={"max_turns": 2})  # the first observation is rendered too
    text = hosted.arguments[0].text

    async def answer(prompt_ids: list[int], params: dict[str, Any]) -> Generation:
        ids: list[int] = turns.tokenizer(DUMMY_ANSWER, add_special_tokens=False).input_ids
        if turns.end_of_turn_id is not None:
            ids = [*ids, turns.end_of_turn_id]
        return Generation(ids, DUMMY_ANSWER, [0.0] * len(ids), False, [0] * len(ids))

    async def play_all() -> None:
        async with ProcessPool(hosted, output) as pool:
            environments = IsolatedEnvironments(pool)
            for row in rows:
                async with environments.episode() as environment:
                    episode = await play(environment, turns, two_turns, row, DUMMY_PARAMS, answer)
                if episode.failure:
                    raise EnvironmentFailure(
                        f"{text}: {episode.failure}; tried with the row {dict(row)!r:.200}"
                    )

    try:
        asyncio.run(play_all())
    except CodeError as error:
        raise EnvironmentFailure(_with_name(text, error)) from error


@dataclass(frozen=True)
class EnvironmentSetup:
    """What a replica needs to run episodes."""

    code: UserCode
    rollout: RolloutConfig  # with `environment`
    data: PromptDataConfig
    tokenizer_path: str
    trust_remote_code: bool
    chat_template: str | None  # Jinja text
    rollout_app: str  # name of the engines' Serve app
    log: Path | None = None  # for the environment's output
    say: Callable[[str], None] | None = None  # receives the first lines of that output


class EnvironmentReplica:
    """Serve replica that runs many episodes concurrently. An environment failure is recorded in its episode,
    never raised.
    """

    async def __init__(self, setup: EnvironmentSetup) -> None:
        assert setup.rollout.environment is not None
        self.setup = setup
        self.config = setup.rollout.environment
        output = OutputLog(NAME, of_this_replica(setup.log), setup.say)
        self.pool = ProcessPool(hosted_environment(setup.code, self.config), output)
        try:
            await self.pool.start()
        except CodeError as error:
            raise EnvironmentFailure(_with_name(setup.code.text, error)) from error
        self.environments = IsolatedEnvironments(self.pool)
        tokenizer = prompt_tokenizer(setup.tokenizer_path, setup.trust_remote_code, setup.chat_template)
        self.turns = Turns(tokenizer, setup.data)
        self._engines: Any = None

    async def episode(self, prompt: Prompt, params: dict[str, Any], min_version: int) -> Episode:
        """Run one episode.

        If its process died while other episodes had calls in it, the episode is restarted once, in a separate
        process.

        Args:
            prompt: its columns are passed to `reset`.
            params: arguments of vLLM's SamplingParams; every turn derives its own seed from theirs.
            min_version: lowest weight version that samples a response.
        """
        started = time.monotonic()
        episode, may_retry = await self._play(self.config, prompt, params, min_version, own_process=False)
        left = self.config.timeout_seconds - (time.monotonic() - started)
        if may_retry and left > 0:
            in_time = self.config.model_copy(update={"timeout_seconds": left})
            episode, _ = await self._play(in_time, prompt, params, min_version, own_process=True)
        return episode

    async def _play(
        self,
        config: EnvironmentConfig,
        prompt: Prompt,
        params: dict[str, Any],
        min_version: int,
        *,
        own_process: bool,
    ) -> tuple[Episode, bool]:
        session = uuid.uuid4().hex  # its turns go to one engine, which has their prefix in its cache

        async def complete(prompt_ids: list[int], params: dict[str, Any]) -> Generation:
            return await self._complete(prompt_ids, params, min_version, session)

        try:
            async with self.environments.episode(own_process=own_process) as environment:
                episode = await play(environment, self.turns, config, prompt.columns, params, complete)
                return episode, environment.may_retry
        except EnvironmentFailure as error:  # no process starts
            return Episode.failed(str(error)), False

    async def _complete(
        self, prompt_ids: list[int], params: dict[str, Any], min_version: int, session: str
    ) -> Generation:
        """One response from the engines; retried on another engine if the first dies."""
        retry_policy = RetryPolicy("engine", "rollout.timeout_seconds", self.setup.rollout.timeout_seconds)
        if self._engines is None:  # not in the constructor: the engines' app may start later
            self._engines = serve.get_app_handle(self.setup.rollout_app)
        engine = self._engines.options(session_id=session)
        return await retry_policy.call(lambda: engine.complete.remote(prompt_ids, params, min_version))

    def __del__(self) -> None:  # Serve calls it when the replica shuts down
        if hasattr(self, "pool"):
            self.pool.close()


def environment_deployment(setup: EnvironmentSetup) -> Any:
    """The bound deployment for `serve.run`."""
    assert setup.rollout.environment is not None
    deployment = serve.deployment(EnvironmentReplica).options(
        name="environment",
        num_replicas=setup.rollout.environment.num_replicas,
        max_ongoing_requests=MAX_EPISODES,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        max_constructor_retry_count=failed_starts(setup.rollout.environment.num_replicas),
    )
    return deployment.bind(setup)
