"""Client that turns prompts into samples, through the rollout deployment or, in multi-turn runs, through the
environment deployment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayrlhf.config.rollout import EngineConfig, RolloutConfig, SamplingConfig
from rayrlhf.data.ends import ResponseEnds
from rayrlhf.rollout.engine import Generation
from rayrlhf.rollout.failures import EngineDied
from rayrlhf.samples import Prompt, Sample

if TYPE_CHECKING:
    from rayrlhf.environments.deployment import Episode

RETRY_SECONDS = 0.5
MAX_ENGINE_DEATHS = 2  # tolerated per request
GREEDY = 1e-6  # below this temperature vLLM samples greedily
EPISODE_GRACE_SECONDS = 30.0  # an episode has its own deadline; this covers a replica that hangs


class RolloutClient:
    """One per training worker. A request whose replica dies is retried on another one, until the deadline."""

    def __init__(
        self,
        engines: Any,
        config: EngineConfig,
        *,
        seed: int,
        ends_of: Callable[[Sequence[str]], ResponseEnds],
        episodes: Any = None,
    ) -> None:
        """
        Args:
            ends_of: maps `sampling.stop` to the token ids and texts that end a response.
            episodes: handle of the environment deployment, in multi-turn runs.
        """
        self.engines = engines
        self.ends_of = ends_of
        self.episodes = episodes
        self.config = config
        self.seed = seed
        self.retries = 0

    async def samples(
        self,
        prompt: Prompt,
        *,
        group_id: int,
        group_size: int,
        min_version: int,
        sampling: SamplingConfig,
    ) -> AsyncIterator[Sample]:
        """Yield `group_size` samples of one prompt, each as soon as it is finished.

        Seeds depend only on (run seed, group, sample), so that results depend neither on which replica
        answers nor on the number of replicas.
        """
        ends = self.ends_of(sampling.stop)
        params = [
            vllm_params(sampling, ends, seed=sample_seed(self.seed, group_id, index))
            for index in range(group_size)
        ]
        if self.episodes is None:
            async for index, generation in self._stream(prompt, params, min_version):
                yield _from_generation(generation, prompt, group_id, index)
            return
        episodes = {
            asyncio.ensure_future(self._episode(prompt, params[i], min_version)): i for i in range(group_size)
        }
        try:
            while episodes:
                finished, _ = await asyncio.wait(episodes, return_when=asyncio.FIRST_COMPLETED)
                for episode in sorted(finished, key=episodes.__getitem__):
                    yield _from_episode(episode.result(), prompt, group_id, episodes.pop(episode))
        finally:
            for episode in episodes:
                episode.cancel()

    def drain_retries(self) -> int:
        """Number of retried requests since the last call."""
        retries, self.retries = self.retries, 0
        return retries

    async def _stream(
        self, prompt: Prompt, params: list[dict[str, Any]], min_version: int
    ) -> AsyncIterator[tuple[int, Generation]]:
        """Yield (index, generation) for each of `params` exactly once, also when replicas die."""
        retry_policy = RetryPolicy("engine", "rollout.timeout_seconds", self.config.timeout_seconds)
        pending = list(range(len(params)))
        while pending:
            requested = list(pending)
            response = self.engines.options(stream=True).generate.remote(
                prompt.prompt_ids, [params[i] for i in requested], min_version, prompt.images
            )
            try:
                while pending:
                    position, generation = await retry_policy.wait(anext(response))
                    pending.remove(requested[position])
                    yield requested[position], generation
            except FAILURES as error:
                self.retries += 1
                await retry_policy.on_failure(error)
            finally:
                if pending:
                    response.cancel()  # the results are no longer needed

    async def _episode(self, prompt: Prompt, params: dict[str, Any], min_version: int) -> Episode:
        assert isinstance(self.config, RolloutConfig) and self.config.environment is not None
        seconds = self.config.environment.timeout_seconds + EPISODE_GRACE_SECONDS
        retry_policy = RetryPolicy("environment", "rollout.environment.timeout_seconds", seconds)
        try:
            return await retry_policy.call(lambda: self.episodes.episode.remote(prompt, params, min_version))
        finally:
            self.retries += retry_policy.retries


FAILURES = (RayActorError, DeploymentUnavailableError, BackPressureError, RayTaskError)


class RetryPolicy:
    """Deadline and retry limit of one request."""

    def __init__(self, target: str, key: str, seconds: float) -> None:
        """
        Args:
            target: what the request is sent to, for messages.
            key: config key of the deadline, for messages.
            seconds: deadline, from now.
        """
        self.target = target
        self.limit = f"{key}={seconds:g}"
        self.deadline = time.monotonic() + seconds
        self.engine_deaths = 0
        self.retries = 0

    async def call(self, request: Callable[[], Any]) -> Any:
        """Send the request, and again after failures; returns its result.

        Args:
            request: sends the request; returns Serve's response.
        """
        while True:
            try:
                return await self.wait(_result(request()))
            except FAILURES as error:
                await self.on_failure(error)

    async def wait(self, answer: Any) -> Any:
        """Await `answer` until the deadline. Raises `TimeoutError`."""
        try:
            return await asyncio.wait_for(answer, max(0.1, self.deadline - time.monotonic()))
        except TimeoutError as error:
            if isinstance(error, RayTaskError):
                raise  # raised by the callee
            raise TimeoutError(f"no {self.target} answered within {self.limit}") from error

    async def on_failure(self, error: Exception) -> None:
        """Wait before the next attempt; raise if the request must not be retried (any more)."""
        if isinstance(error, RayTaskError):
            if not isinstance(error.cause, RayActorError | RayServeException | EngineDied):
                raise error
            self.engine_deaths += isinstance(error.cause, EngineDied)
            if self.engine_deaths > MAX_ENGINE_DEATHS:
                raise error  # the request itself kills engines: retrying would take the others down
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"no {self.target} came back within {self.limit}") from error
        self.retries += 1
        await asyncio.sleep(RETRY_SECONDS)


def _from_generation(generation: Generation, prompt: Prompt, group_id: int, index: int) -> Sample:
    return Sample(
        group_id=group_id,
        sample_index=index,
        prompt=prompt,
        response_ids=generation.token_ids,
        response=generation.text,
        rollout_logprobs=generation.logprobs,
        loss_mask=[1] * len(generation.token_ids),
        policy_versions=generation.policy_versions,
        truncated=generation.truncated,
        routed_experts=generation.routed_experts,
    )


def _from_episode(episode: Episode, prompt: Prompt, group_id: int, index: int) -> Sample:
    return Sample(
        group_id=group_id,
        sample_index=index,
        prompt=replace(prompt, prompt_ids=episode.prompt_ids, prompt=episode.prompt),
        response_ids=episode.response_ids,
        response=episode.response,
        rollout_logprobs=episode.logprobs,
        loss_mask=episode.loss_mask,
        policy_versions=episode.policy_versions,
        truncated=episode.truncated,
        episode_reward=episode.reward,
        num_turns=episode.num_turns,
        failure=episode.failure,
        routed_experts=episode.routed_experts,
    )


def vllm_params(sampling: SamplingConfig, ends: ResponseEnds, *, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams as a plain dict (the caller does not import vllm)."""
    return {
        "temperature": sampling.temperature if sampling.temperature > GREEDY else 0.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens,
        "stop": list(ends.texts) or None,
        "stop_token_ids": list(ends.token_ids) or None,
        "seed": seed,
        "logprobs": 0,  # of the sampled token only
    }


def sample_seed(run_seed: int, group_id: int, sample_index: int) -> int:
    """A distinct seed for every sample of a run."""
    return int(np.random.SeedSequence([run_seed, group_id, sample_index]).generate_state(1)[0])


async def _result(response: Any) -> Any:
    return await response
