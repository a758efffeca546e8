"""Prompts to samples, through the rollout deployment."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayrlhf.batch import Prompt, Sample
from rayrlhf.config.rollout import RolloutConfig, SamplingConfig
from rayrlhf.rollout.engine import Generation
from rayrlhf.rollout.failures import EngineDied

RETRY_SECONDS = 0.5
MAX_ENGINE_DEATHS = 2  # that one request survives
GREEDY = 1e-6  # below this temperature vLLM takes the likeliest token


class RolloutClient:
    """One per training worker. A request whose replica dies goes to another one, until the deadline."""

    def __init__(self, engines: Any, config: RolloutConfig, *, seed: int) -> None:
        self.engines = engines
        self.config = config
        self.seed = seed
        self.retries = 0

    async def group(
        self,
        prompt: Prompt,
        *,
        group_id: int,
        group_size: int,
        step: int,
        min_version: int,
        sampling: SamplingConfig,
    ) -> list[Sample]:
        """`group_size` samples of one prompt. Seeds depend on (run seed, step, group, sample) alone, so that
        results depend neither on which replica answers nor on how many there are.
        """
        params = [
            vllm_params(sampling, seed=sample_seed(self.seed, step, group_id, index))
            for index in range(group_size)
        ]
        generations = await self._request(prompt.prompt_ids, params, min_version)
        return [
            Sample(
                group_id=group_id,
                sample_index=index,
                prompt=prompt,
                response_ids=generation.token_ids,
                response=generation.text,
                rollout_logprobs=generation.logprobs,
                loss_mask=[1] * len(generation.token_ids),
                policy_version=generation.policy_version,
                truncated=generation.truncated,
            )
            for index, generation in enumerate(generations)
        ]

    def drain_retries(self) -> int:
        """Requests sent again since the last call."""
        retries, self.retries = self.retries, 0
        return retries

    async def _request(
        self, prompt_ids: list[int], params: list[dict[str, Any]], min_version: int
    ) -> list[Generation]:
        deadline = time.monotonic() + self.config.timeout_seconds
        deaths = 0
        while True:
            try:
                response = self.engines.generate.remote(prompt_ids, params, min_version)
                return await asyncio.wait_for(_result(response), max(0.1, deadline - time.monotonic()))
            except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
                last_error: Exception = error
            except RayTaskError as error:
                if not isinstance(error.cause, RayActorError | RayServeException | EngineDied):
                    raise
                deaths += isinstance(error.cause, EngineDied)
                if deaths > MAX_ENGINE_DEATHS:
                    raise  # the request itself kills engines: trying on would only take the others down
                last_error = error
            except TimeoutError as error:
                raise TimeoutError(
                    f"no engine answered within rollout.timeout_seconds={self.config.timeout_seconds:g}"
                ) from error
            self.retries += 1
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no engine came back within rollout.timeout_seconds={self.config.timeout_seconds:g}"
                ) from last_error
            await asyncio.sleep(RETRY_SECONDS)


def vllm_params(sampling: SamplingConfig, *, seed: int) -> dict[str, Any]:
    """vLLM's SamplingParams as a plain dict (the caller does not import vllm)."""
    return {
        "temperature": sampling.temperature if sampling.temperature > GREEDY else 0.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop) or None,
        "seed": seed,
        "logprobs": 0,  # the sampled token's own
    }


def sample_seed(run_seed: int, step: int, group_id: int, sample_index: int) -> int:
    """A seed of its own for every sample of a run."""
    return int(np.random.SeedSequence([run_seed, step, group_id, sample_index]).generate_state(1)[0])


async def _result(response: Any) -> Any:
    return await response
