"""Scores for samples: every source asked at once, weighted, clipped; what fails is retried, then dropped
and counted.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrlhf.batch import Sample
from rayrlhf.config.reward import RewardConfig

BACKOFF_SECONDS = 0.5


class RewardFailure(RuntimeError):
    """Too many samples could not be scored."""


@dataclass(frozen=True)
class RewardSource:
    """A served source: anything with `score(prompts, responses, token_ids)` behind a Serve handle."""

    name: str
    weight: float
    handle: Any


class RewardClient:
    """Scores groups of samples. Keeps count of failures until `drain_failures` is called."""

    def __init__(self, sources: Sequence[RewardSource], config: RewardConfig) -> None:
        self.sources = sources
        self.config = config
        self.failures: Counter[str] = Counter()
        self.last_error: dict[str, str] = {}

    async def score(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples with `score` set; it stays None where a source failed for good."""
        per_source = await asyncio.gather(*(self._ask(source, samples) for source in self.sources))
        return [
            replace(sample, score=self._combine(sample, list(values)))
            for sample, values in zip(samples, zip(*per_source, strict=True), strict=True)
        ]

    def _combine(self, sample: Sample, values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        if sample.truncated and self.config.truncation_penalty is not None:
            return self.config.truncation_penalty
        total = sum(source.weight * value for source, value in zip(self.sources, known, strict=True))
        return (
            total if self.config.clip is None else min(max(total, self.config.clip[0]), self.config.clip[1])
        )

    async def _ask(self, source: RewardSource, samples: Sequence[Sample]) -> list[float | None]:
        """One source's rewards; samples that fail are asked again, then given up as None."""
        rewards: list[float | None] = [None] * len(samples)
        for attempt in range(self.config.retries + 1):
            missing = [i for i, reward in enumerate(rewards) if reward is None]
            if not missing:
                break
            if attempt:
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            for i, reward in zip(
                missing, await self._try(source, [samples[i] for i in missing]), strict=True
            ):
                rewards[i] = reward
        self.failures[source.name] += sum(reward is None for reward in rewards)
        return rewards

    async def _try(self, source: RewardSource, samples: Sequence[Sample]) -> list[float | None]:
        prompts = [sample.prompt for sample in samples]
        responses = [sample.response for sample in samples]
        token_ids = [[*sample.prompt.prompt_ids, *sample.response_ids] for sample in samples]
        try:
            response = source.handle.score.remote(prompts, responses, token_ids)
            rewards = await asyncio.wait_for(_result(response), self.config.timeout_seconds)
        except Exception as error:
            # The border to code that is not ours: whatever it raises, the sample counts as failed, with the
            # reason.
            lines = str(error).strip().splitlines()
            self.last_error[source.name] = f"{type(error).__name__}: {lines[-1]}" if lines else repr(error)
            return [None] * len(samples)
        if len(rewards) != len(samples):
            self.last_error[source.name] = f"returned {len(rewards)} rewards for {len(samples)} responses"
            return [None] * len(samples)
        bad = [reward for reward in rewards if reward is None or not math.isfinite(reward)]
        if bad:
            self.last_error[source.name] = f"returned {bad[0]}"
        return [None if reward is None or not math.isfinite(reward) else float(reward) for reward in rewards]

    def drain_failures(self) -> dict[str, str]:
        """What failed since the last call: source name -> how many samples, and the last reason."""
        told = {
            name: f"{count} samples failed: {self.last_error.get(name, 'no reason given')}"
            for name, count in self.failures.items()
            if count
        }
        self.failures.clear()
        self.last_error.clear()
        return told

    def check(self, num_failed: int, num_samples: int) -> None:
        """Stop the run when more than `reward.max_failed_fraction` of a step failed, or all of it."""
        allowed = min(self.config.max_failed_fraction * num_samples, num_samples - 1)
        if num_failed > max(allowed, 0):
            reasons = (
                "; ".join(f"{name}: {error}" for name, error in self.last_error.items()) or "on another rank"
            )
            raise RewardFailure(
                f"{num_failed} of {num_samples} samples could not be scored after {self.config.retries} "
                f"retries (reward.max_failed_fraction={self.config.max_failed_fraction:g}). "
                f"Last error: {reasons}"
            )


async def _result(response: Any) -> Any:
    return await response
