"""One multi-turn episode of policy and environment, recorded as tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rayrlhf.config.rollout import EnvironmentConfig
from rayrlhf.data.rows.row import BadRow
from rayrlhf.environments.chat_tokens import Turns
from rayrlhf.environments.user_environment import EnvironmentFailure
from rayrlhf.rollout.engine import Generation

# (prompt_ids, arguments of vLLM's SamplingParams) -> one generation
Complete = Callable[[list[int], dict[str, Any]], Awaitable[Generation]]


@dataclass(frozen=True)
class Episode:
    """The result of an episode. The lists have one entry per token after the opening."""

    prompt_ids: list[int]  # the opening; empty if there was none, which is a failure
    prompt: str
    response_ids: list[int]  # responses and observations, in order
    response: str  # their text: responses without special tokens, observations with those of the template
    logprobs: list[float]  # 0 on the observations' tokens
    loss_mask: list[int]  # 1 on the policy's tokens
    policy_versions: list[int]  # of the weights that sampled the token, or processed it if it is masked
    truncated: bool  # token limit reached, in a response or before one
    num_turns: int  # number of responses
    reward: float | None  # sum over the steps; None after a failure
    failure: str = ""
    routed_experts: np.ndarray | None = None  # of all tokens, as in `Sample`

    @classmethod
    def failed(cls, reason: str) -> Episode:
        """An episode that failed before it started."""
        return _Transcript().episode(reason)


class Playable(Protocol):
    """Interface of an environment used by `play`. Its methods raise `EnvironmentFailure`."""

    running: str  # the user method that is running

    async def reset(self, row: dict[str, Any]) -> Any: ...

    async def step(self, response: str) -> tuple[Any, float, bool]: ...

    async def close(self) -> None: ...


async def play(
    environment: Playable,
    turns: Turns,
    config: EnvironmentConfig,
    row: Mapping[str, Any],
    params: Mapping[str, Any],
    complete: Complete,
) -> Episode:
    """Run one episode.

    An error of the environment or the deadline ends it with a `failure` and the tokens so far; exceptions of
    `complete` are propagated.

    The episode ends when the environment is done, after `max_turns` responses, and (as truncated) with a
    response cut off by its token limit or when `max_response_tokens` leave no room for another one. The
    environment does not receive a response that was cut off.
    """
    transcript = _Transcript()
    failure = ""
    deadline = asyncio.timeout(config.timeout_seconds)
    try:
        async with deadline:
            await _run_turns(transcript, environment, turns, config, row, params, complete)
    except EnvironmentFailure as error:
        failure = str(error)
    except TimeoutError:
        if not deadline.expired():
            raise  # raised by the engine
        failure = (
            f"timed out after {config.timeout_seconds:g} s in {environment.running or 'generation'} "
            "(rollout.environment.timeout_seconds)"
        )
    finally:
        await environment.close()
    return transcript.episode(failure)


async def _run_turns(
    transcript: _Transcript,
    environment: Playable,
    turns: Turns,
    config: EnvironmentConfig,
    row: Mapping[str, Any],
    params: Mapping[str, Any],
    complete: Complete,
) -> None:
    opening = await environment.reset(dict(row))
    try:
        transcript.prompt, transcript.prompt_ids = turns.opening(opening)
    except BadRow as error:
        raise EnvironmentFailure(f"reset(): {error}") from error
    observation, observation_ids = "", []
    for turn in range(config.max_turns):
        history = transcript.prompt_ids + transcript.response_ids + observation_ids
        room = config.max_response_tokens - len(transcript.response_ids) - len(observation_ids)
        if room < 1:
            transcript.truncated = True
            return
        generation = await complete(history, turn_params(params, turns.end_of_turn_id, turn=turn, room=room))
        transcript.add(observation, observation_ids, generation)
        if generation.truncated:
            transcript.truncated = True
            return
        next_observation, reward, done = await environment.step(generation.text)
        transcript.reward += reward
        if done or turn + 1 == config.max_turns:
            return
        try:
            observation, observation_ids = turns.between(generation.token_ids, next_observation)
        except BadRow as error:
            raise EnvironmentFailure(f"step(): {error}") from error


def turn_params(
    params: Mapping[str, Any], end_of_turn_id: int | None, *, turn: int, room: int
) -> dict[str, Any]:
    """The episode's sampling parameters for one turn: a distinct seed and at most `room` tokens."""
    longest = min(params["max_tokens"], room)
    changes: dict[str, Any] = {
        "max_tokens": longest,
        "min_tokens": min(params.get("min_tokens") or 0, longest),
        "include_stop_str_in_output": True,  # the tokens contain it, so the environment receives it too
    }
    if params.get("seed") is not None:
        changes["seed"] = int(np.random.SeedSequence([params["seed"], turn]).generate_state(1)[0])
    if end_of_turn_id is not None:
        others = params.get("stop_token_ids") or []
        changes["stop_token_ids"] = list(dict.fromkeys([end_of_turn_id, *others]))
    return {**params, **changes}


@dataclass
class _Transcript:
    """An episode in progress."""

    prompt_ids: list[int] = field(default_factory=list)
    prompt: str = ""
    response_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)
    truncated: bool = False
    num_turns: int = 0
    reward: float = 0.0
    routed_experts: np.ndarray | None = None

    def add(self, observation: str, observation_ids: list[int], generation: Generation) -> None:
        """Append an observation and the response to it. A last observation without a response is left out: no
        loss token follows it.
        """
        assert generation.token_ids, "a generation has at least one token"
        self.texts += [observation, generation.text]
        self.response_ids += [*observation_ids, *generation.token_ids]
        self.logprobs += [*[0.0] * len(observation_ids), *generation.logprobs]
        self.loss_mask += [0] * len(observation_ids) + [1] * len(generation.token_ids)
        readers = generation.policy_versions[:1] * len(observation_ids)
        self.policy_versions += [*readers, *generation.policy_versions]
        self.num_turns += 1
        routes = generation.routed_experts  # of the whole history, which newer weights may have read again
        if self.routed_experts is not None and routes is not None:
            known = len(self.routed_experts) - 1  # the last token of a turn is routed in the next one
            routes = np.concatenate([self.routed_experts[:known], routes[known:]])
        self.routed_experts = routes

    def episode(self, failure: str) -> Episode:
        return Episode(
            prompt_ids=self.prompt_ids,
            prompt=self.prompt,
            response_ids=self.response_ids,
            response="".join(self.texts),
            logprobs=self.logprobs,
            loss_mask=self.loss_mask,
            policy_versions=self.policy_versions,
            truncated=self.truncated,
            num_turns=self.num_turns,
            reward=None if failure else self.reward,
            failure=failure,
            routed_experts=self.routed_experts,
        )
