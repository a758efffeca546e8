"""Client for raw rewards: queries all sources concurrently, retries failures, counts what fails for good."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from rayrlhf.config.reward import RewardConfig
from rayrlhf.reward.items import (
    Failure,
    RewardError,
    ScoreItem,
    Unverified,
    checked_reward,
    last_message,
)
from rayrlhf.samples import Sample
from rayrlhf.untrusted_text import one_line

BACKOFF_SECONDS = 0.5  # before the first retry; doubled for each further one
MAX_BACKOFF_SECONDS = 30.0


class RewardFailure(RuntimeError):
    """Too many samples could not be scored."""


@dataclass(frozen=True)
class RewardSource:
    """A served source: anything with `score(items)` behind a Serve handle.

    Without a handle it is the environment, whose rewards are part of the samples.
    """

    name: str
    weight: float
    handle: Any | None


class RewardClient:
    """Scores samples, one or many at a time. Accumulates failures until `drain_failures` is called."""

    def __init__(self, sources: Sequence[RewardSource], config: RewardConfig) -> None:
        self.sources = sources
        self.config = config
        self._attempts = {source.name: count() for source in sources}
        # Samples may be scored on another thread than the one that drains the failures.
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._last_reason: dict[str, str] = {}
        self._num_unverified = 0

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples, in order, with `source_rewards`: None where a source failed after all retries."""
        per_source = await asyncio.gather(*(self._ask(source, samples) for source in self.sources))
        return [
            replace(sample, source_rewards=rewards)
            for sample, rewards in zip(samples, zip(*per_source, strict=True), strict=True)
        ]

    async def _ask(self, source: RewardSource, samples: Sequence[Sample]) -> list[float | None]:
        """One source's rewards; failed samples are retried, then None."""
        rewards: list[float | Failure] = [Failure("not requested")] * len(samples)
        retries = self.config.retries if source.handle is not None else 0
        first_attempt = next(self._attempts[source.name])
        for retry in range(retries + 1):
            missing = [i for i, r in enumerate(rewards) if isinstance(r, Failure) and not r.final]
            if not missing:
                break
            if retry:
                await asyncio.sleep(backoff_seconds(source.name, samples[missing[0]], retry))
            answers = await self._try(source, [samples[i] for i in missing], attempt=first_attempt + retry)
            for i, reward in zip(missing, answers, strict=True):
                rewards[i] = reward
        self._count(source.name, sum(isinstance(reward, Failure) for reward in rewards))
        return [None if isinstance(reward, Failure) else reward for reward in rewards]

    async def _try(
        self, source: RewardSource, samples: Sequence[Sample], *, attempt: int
    ) -> list[float | Failure]:
        if source.handle is None:
            answers: list[Any] = [_environment_reward(sample) for sample in samples]
        else:
            answers = await self._request(source, samples, attempt)
        unverified = [answer for answer in answers if isinstance(answer, Unverified)]
        with self._lock:
            self._num_unverified += len(unverified)
        rewards = [checked_reward(answer) for answer in answers]
        reasons = [reward.reason for reward in rewards if isinstance(reward, Failure)]
        if reasons:
            with self._lock:
                self._last_reason[source.name] = one_line(reasons[-1])
        return rewards

    async def _request(self, source: RewardSource, samples: Sequence[Sample], attempt: int) -> list[Any]:
        assert source.handle is not None
        items = [
            ScoreItem(
                prompt=sample.prompt,
                response=sample.response,
                token_ids=[*sample.prompt.prompt_ids, *sample.response_ids],
                attempt=attempt,
            )
            for sample in samples
        ]
        try:
            answers = await asyncio.wait_for(
                _result(source.handle.score.remote(items)), self.config.timeout_seconds
            )
        except Exception as error:
            # User code or a foreign server: whatever it raises, the samples count as failed, with the reason.
            return [Failure(self._reason(error))] * len(samples)
        if len(answers) != len(samples):
            return [Failure(f"returned {len(answers)} rewards for {len(samples)} responses")] * len(samples)
        return answers

    def _reason(self, error: Exception) -> str:
        if type(error) is TimeoutError:
            return f"no answer within reward.timeout_seconds={self.config.timeout_seconds:g}"
        # It is logged and counted by its text, which may contain text of a response.
        if isinstance(getattr(error, "cause", None), RewardError):
            return one_line(last_message(error))
        return one_line(
            f"{type(error).__name__}: {last_message(error)}" if str(error).strip() else repr(error)
        )

    def _count(self, name: str, num_failed: int) -> None:
        with self._lock:
            self._failures[name] += num_failed

    def drain_failures(self) -> dict[str, str]:
        """Failures since the last call: source name -> number of samples and the last reason."""
        with self._lock:
            failures = {
                name: f"{failed} samples failed: {self._last_reason.get(name, 'no reason given')}"
                for name, failed in self._failures.items()
                if failed
            }
            self._failures.clear()
            self._last_reason.clear()
        return failures

    def drain_unverified(self) -> int:
        """Number of answers since the last call that took too long to verify; they count as wrong."""
        with self._lock:
            drained, self._num_unverified = self._num_unverified, 0
        return drained

    def check(self, num_failed: int, num_samples: int) -> None:
        """Raises `RewardFailure` if more than `reward.max_failed_fraction` of a step, or all, failed."""
        allowed = min(self.config.max_failed_fraction * num_samples, num_samples - 1)
        if num_failed > max(allowed, 0):
            with self._lock:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in self._last_reason.items())
            raise RewardFailure(
                f"{num_failed} of {num_samples} samples could not be scored after {self.config.retries} "
                f"retries (reward.max_failed_fraction={self.config.max_failed_fraction:g}). "
                f"Last error: {reasons or 'on another rank'}"
            )


def backoff_seconds(source: str, sample: Sample, retry: int) -> float:
    """The wait before retry number `retry` (from 1): exponential, shortened at random by up to one half.

    The jitter is seeded per sample: samples that failed together are not retried together, and a repeated run
    waits equally long.
    """
    longest = min(BACKOFF_SECONDS * 2 ** (retry - 1), MAX_BACKOFF_SECONDS)
    jitter = random.Random(f"{source}:{sample.group_id}:{sample.sample_index}:{retry}")
    return longest * (1 - jitter.random() / 2)


def _environment_reward(sample: Sample) -> float | Failure:
    if sample.episode_reward is None:
        return Failure(sample.failure or "the environment gave no reward")
    return sample.episode_reward


async def _result(response: Any) -> Any:
    return await response
