"""Environments resolved and tried on the driver, and a replica with engines that die and calls that hang."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.config.rollout import EnvironmentConfig, RolloutConfig
from rayrlhf.environments import deployment as environments
from rayrlhf.environments.chat_tokens import Turns
from rayrlhf.environments.deployment import (
    EnvironmentReplica,
    EnvironmentSetup,
    hosted_environment,
    try_environment,
)
from rayrlhf.environments.episode import Episode
from rayrlhf.environments.user_environment import EnvironmentFailure
from rayrlhf.isolation.output import OutputLog
from rayrlhf.rollout import client as client_module
from rayrlhf.rollout.engine import Generation
from rayrlhf.rollout.failures import EngineDied
from rayrlhf.usercode import UserCode, UserCodeError, find_user_code
from tests.samples import make_prompt
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

PARAMS = {"max_tokens": 4, "seed": 1}
DATA = PromptDataConfig.model_validate({"train": ["prompts.jsonl"], "max_prompt_tokens": 40})
TURNS = Turns(make_tokenizer(CHAT_TEMPLATE), DATA)


def find_environment(text: str, **config: Any) -> UserCode:
    return environments.find_environment(EnvironmentConfig(environment=text, **config))


class Counter:
    """Done after as many steps as the row says."""

    def reset(self, row: dict[str, Any]) -> str:
        self.left = row["steps"]
        return "Go"

    def step(self, response: str) -> Any:
        self.left -= 1
        return "again", 1.0, self.left == 0


class Hanging(Counter):
    def step(self, response: str) -> Any:
        time.sleep(1000)


class Engines:
    """Raises the given failures first, one per request, then answers with its two tokens."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.requests: list[tuple[list[int], dict[str, Any], int]] = []
        self.sessions: list[str] = []  # of each request
        self.complete = self

    def options(self, *, session_id: str) -> Engines:
        self.sessions.append(session_id)
        return self

    def remote(self, prompt_ids: list[int], params: dict[str, Any], min_version: int) -> Any:
        self.requests.append((prompt_ids, params, min_version))
        return self._answer(min_version)

    async def _answer(self, min_version: int) -> Generation:
        if self.failures:
            raise self.failures.pop(0)
        return Generation([70, 2], "x", [-0.5, -1.0], False, [min_version] * 2)


def in_task(cause: Exception) -> RayTaskError:
    """How Ray raises the error of a remote method: an exception of both types."""
    return RayTaskError("complete", "Traceback …", cause).as_instanceof_cause()


@pytest.fixture
def make_replica(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(client_module, "RETRY_SECONDS", 0.0)

    @asynccontextmanager
    async def make(
        engines: Engines, text: str = f"{Path(__file__)}:Counter", **config: Any
    ) -> AsyncIterator[EnvironmentReplica]:
        rollout = RolloutConfig.model_validate({"environment": {"environment": text, **config}})
        code = find_user_code(text, "class")
        replica = EnvironmentReplica.__new__(EnvironmentReplica)
        await replica.__init__(EnvironmentSetup(code, rollout, DATA, tiny_model, False, None, "engines"))
        monkeypatch.setattr(environments.serve, "get_app_handle", {"engines": engines}.__getitem__)
        try:
            yield replica
        finally:
            await replica.pool.kill()

    return make


def played(making: Any, *, steps: int) -> Episode:
    async def play() -> Episode:
        async with making as replica:
            return await replica.episode(make_prompt(steps=steps), PARAMS, 5)

    return asyncio.run(play())


def test_a_turn_whose_engine_dies_is_retried(make_replica: Any) -> None:
    undisturbed, disturbed = Engines(), Engines(in_task(EngineDied("out of memory")))
    episode = played(make_replica(undisturbed), steps=3)
    assert played(make_replica(disturbed), steps=3) == episode
    assert (episode.reward, episode.num_turns, set(episode.policy_versions)) == (3.0, 3, {5})
    # The same tokens with the same seed: only the turn is restarted, not the episode.
    assert disturbed.requests == [undisturbed.requests[0], *undisturbed.requests]


def test_the_turns_of_an_episode_have_a_session_of_their_own(make_replica: Any) -> None:
    engines = Engines()
    for steps in (3, 2):
        played(make_replica(engines), steps=steps)
    first, second = set(engines.sessions[:3]), set(engines.sessions[3:])
    assert len(engines.sessions) == 5 and len(first) == len(second) == 1 and first != second


def test_a_request_that_kills_engines_is_not_retried_forever(make_replica: Any) -> None:
    deaths = [in_task(EngineDied("out of memory")) for _ in range(9)]
    with pytest.raises(EngineDied):
        played(make_replica(Engines(*deaths)), steps=1)


def test_an_error_of_the_engine_is_not_an_environment_failure(make_replica: Any) -> None:
    with pytest.raises(ValueError):
        played(make_replica(Engines(in_task(ValueError("longer than the model")))), steps=1)


def test_calls_that_never_return_cost_a_process(make_replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their threads would slow the others down. Later episodes get another process."""
    monkeypatch.setattr(environments, "MAX_STUCK_CALLS", 2)

    async def main() -> None:
        async with make_replica(Engines(), f"{Path(__file__)}:Hanging", timeout_seconds=1.5) as replica:
            for started in (1, 1, 2):
                episode = await replica.episode(make_prompt(steps=1), PARAMS, 5)
                assert episode.failure.startswith("timed out after 1.5 s in step()")
                assert replica.pool.num_started == started
            assert len(replica.pool._processes) == 1, "the previous one is gone"

    asyncio.run(main())


FATAL = """
import os, time

class Counter:
    def reset(self, row):
        self.row = row
        return "Go"

    def step(self, response):
        exec(self.row["does"])
        return "again", 1.0, True
"""


@pytest.fixture
def fatal(tmp_path: Path) -> str:
    path = tmp_path / "fatal.py"
    path.write_text(FATAL)
    return f"{path}:Counter"


@pytest.mark.parametrize(
    "does, failure",
    [
        ("exit()", r"step\(\) raised SystemExit: None"),
        ("raise KeyboardInterrupt", r"step\(\) raised KeyboardInterrupt"),
        ("os._exit(0)", r"step\(\): it ended its own process with exit code 0"),
        ("os.abort()", r"step\(\): its process was killed by SIGABRT"),
    ],
)
def test_an_episode_that_ends_its_process_has_failed(
    does: str, failure: str, fatal: str, make_replica: Any
) -> None:
    async def main() -> tuple[Episode, Episode]:
        async with make_replica(Engines(), fatal) as replica:
            bad = await replica.episode(make_prompt(does=does), PARAMS, 5)
            return bad, await replica.episode(make_prompt(does="pass"), PARAMS, 5)

    bad, next_one = asyncio.run(main())
    assert re.match(failure, bad.failure) and bad.reward is None
    assert (next_one.failure, next_one.reward) == ("", 1.0), "another process has replaced it"


def test_episodes_in_the_process_of_one_that_ends_it_are_restarted(fatal: str, make_replica: Any) -> None:
    async def main() -> list[Episode]:
        async with make_replica(Engines(), fatal) as replica:
            rows = ["time.sleep(0.5)", "time.sleep(0.5)", "time.sleep(0.2) or os._exit(1)"]
            episodes = await asyncio.gather(
                *(replica.episode(make_prompt(does=does), PARAMS, 5) for does in rows)
            )
            return episodes

    *others, culprit = asyncio.run(main())
    assert culprit.reward is None and "exit code 1" in culprit.failure
    assert [(episode.reward, episode.failure) for episode in others] == [(1.0, "")] * 2


# On the driver, before any model is loaded

FILE = """
class Greeter:
    def __init__(self, greeting="Hello"):
        self.greeting = greeting

    def reset(self, row):
        greeting = f"{self.greeting} {row['name']}"
        if "log" in row:
            print(greeting, file=open(row["log"], "a"))
        return greeting

    def step(self, response):
        return {"role": "tool", "content": "1"}, 0.0, False

class Half:
    def reset(self, row):
        return "?"

def function():
    pass
"""


@pytest.fixture
def greeter(tmp_path: Path) -> str:
    path = tmp_path / "greeter.py"
    path.write_text(FILE)
    return str(path)


def tried(text: str, rows: list[dict[str, Any]], **config: Any) -> None:
    settings = EnvironmentConfig(environment=text, **config)
    hosted = hosted_environment(find_environment(text), settings)
    try_environment(hosted, OutputLog("environment"), settings, rows, TURNS)


def test_a_trial_uses_real_rows(greeter: str, tmp_path: Path) -> None:
    code = find_environment(f"{greeter}:Greeter")
    Path(greeter).unlink()  # as on another node
    config = EnvironmentConfig(environment=code.text, arguments={"greeting": "Hi"})
    hosted = hosted_environment(code, config)
    log = tmp_path / "greetings"
    rows = [{"name": name, "log": str(log)} for name in ("A", "B")]
    try_environment(hosted, OutputLog("environment"), config, rows, TURNS)
    assert log.read_text().splitlines() == ["Hi A", "Hi B"]


@pytest.mark.parametrize(
    "rows, config, message",
    [
        (
            [{"name": "A"}, {}],
            {},
            r"Greeter: reset\(\) raised KeyError: 'name' \(greeter.py:7\); .* row {}",
        ),
        (
            [{"name": "A"}],
            {"arguments": {"greting": "Hi"}},
            r"__init__\(\) raised TypeError: .* unexpected keyword argument 'greting'",
        ),
        ([{"name": "A" * 50}], {}, r"reset\(\): the opening has 60 tokens"),
    ],
)
def test_a_trial_reports_the_error(rows: Any, config: dict[str, Any], message: str, greeter: str) -> None:
    with pytest.raises(EnvironmentFailure, match=message):
        tried(f"{greeter}:Greeter", rows, **config)


def test_a_trial_renders_an_observation(tmp_path: Path) -> None:
    path = tmp_path / "mute.py"
    path.write_text(FILE.replace('"content": "1"', '"text": "1"'))
    with pytest.raises(EnvironmentFailure, match=r"step\(\): a message with role 'tool' and content None"):
        tried(f"{path}:Greeter", [{"name": "A"}])


@pytest.mark.parametrize(
    "name, message",
    [
        ("Greter", "has no class 'Greter'; it has: Greeter, Half"),
        ("function", "has no class 'function'; it has: Greeter, Half"),
        ("Half", r"has no method step; wanted reset\(row\) and step\(response\)"),
    ],
)
def test_classes_that_cannot_be_used(name: str, message: str, greeter: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        find_environment(f"{greeter}:{name}")


def test_a_class_of_a_module() -> None:
    assert find_environment("tests.environments.test_deployment:Counter").load().__name__ == "Counter"
    with pytest.raises(UserCodeError, match=r"nowhere.py is not a file .looked from /"):
        find_environment("nowhere.py:Counter")
