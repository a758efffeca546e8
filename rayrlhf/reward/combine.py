"""Combines the raw rewards of several sources into one score: normalise, weight, sum, penalise, clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rayrlhf.config.reward import RewardConfig
from rayrlhf.reward.items import LARGEST_REWARD
from rayrlhf.reward.normalize import RunningMoments, SumOverRanks, batch_moments
from rayrlhf.samples import Sample


class RewardCombiner:
    """score = clip(Σ weight · (normalised) reward − overlong penalty), or the truncation penalty instead.

    Its running moments are the same on every rank and are part of the checkpoint.
    """

    def __init__(self, config: RewardConfig, *, response_limit: int) -> None:
        """`response_limit`: max response tokens, at which the overlong penalty reaches its maximum."""
        self.config = config
        self.response_limit = response_limit
        self.names = config.source_names
        self.weights = [source.weight for source in config.sources]
        self.normalized = [i for i, source in enumerate(config.sources) if source.normalize]
        self.moments = RunningMoments.none_yet(len(self.normalized))

    def combine(
        self, samples: Sequence[Sample], sum_over_ranks: SumOverRanks, *, normalize: bool = True
    ) -> list[Sample]:
        """The same samples with `score`; None if a source failed, or if the weighted sum is too large.
        Collective if it normalises.

        The running statistics are updated with these samples before they are applied; a sample with a failed
        source is excluded from all of them. `normalize=False` changes neither rewards nor statistics:
        evaluations must be on the same scale to be comparable.
        """
        scored = [i for i, sample in enumerate(samples) if None not in sample.source_rewards]
        raw = torch.tensor([samples[i].source_rewards for i in scored], dtype=torch.float64)
        raw = raw.reshape(len(scored), len(self.names))  # [N, sources], also for N = 0
        if self.normalized and normalize:
            batch = batch_moments(raw[:, self.normalized], sum_over_ranks)
            self.moments = self.moments.merged(batch)
            raw[:, self.normalized] = self.moments.normalized(raw[:, self.normalized])
        result = [replace(sample, score=None) for sample in samples]
        for i, rewards in zip(scored, raw.tolist(), strict=True):
            result[i] = replace(samples[i], score=self._final(samples[i], self._weighted_sum(rewards)))
        return result

    def raw_reward(self, sample: Sample, source: str | None = None) -> float:
        """The raw reward of a scored sample from the named source, or without a name the weighted sum of all:
        before normalisation, overlong and truncation penalties and clip, which are unrelated to correctness.
        """
        rewards = [reward for reward in sample.source_rewards if reward is not None]
        assert len(rewards) == len(self.names), "a scored sample has the rewards of all sources"
        return self._weighted_sum(rewards) if source is None else rewards[self.names.index(source)]

    def _weighted_sum(self, rewards: Sequence[float]) -> float:
        """Summed in a fixed order, so that it does not depend on the other samples."""
        return sum(weight * reward for weight, reward in zip(self.weights, rewards, strict=True))

    def _final(self, sample: Sample, total: float) -> float | None:
        """The final score; None (failed) if it is too large for losses in float32."""
        overlong, clip = self.config.overlong, self.config.clip
        if overlong is not None:
            total -= overlong.factor * overlong_share(
                len(sample.response_ids), self.response_limit, overlong.buffer_tokens
            )
        if sample.truncated and self.config.truncation_penalty is not None:
            total = self.config.truncation_penalty
        score = total if clip is None else min(max(total, clip[0]), clip[1])
        return score if abs(score) <= LARGEST_REWARD else None

    def source_means(self, samples: Sequence[Sample], sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """`reward/source/<name>`: mean raw reward over all ranks' samples that the source has scored.

        A source without scored samples is omitted. Collective.
        """
        given = [[reward for reward in rewards if reward is not None] for rewards in self._columns(samples)]
        local = torch.tensor([[sum(rewards), len(rewards)] for rewards in given], dtype=torch.float64)
        totals = sum_over_ranks(local).tolist()
        return {
            f"reward/source/{name}": total / count
            for name, (total, count) in zip(self.names, totals, strict=True)
            if count
        }

    def _columns(self, samples: Sequence[Sample]) -> list[list[float | None]]:
        rows = [sample.source_rewards for sample in samples]
        return [[row[i] for row in rows] for i in range(len(self.names))]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers by source name: {"reward0": {"count": …, "mean": …, "m2": …}}."""
        return {self.names[i]: self._state_of(column) for column, i in enumerate(self.normalized)}

    def _state_of(self, column: int) -> dict[str, float]:
        moments = self.moments
        tensors: dict[str, Tensor] = {"count": moments.count, "mean": moments.mean, "m2": moments.m2}
        return {name: float(tensor[column]) for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state. A source that was not normalised in it starts without statistics."""
        nothing = {"count": 0.0, "mean": 0.0, "m2": 0.0}
        rows = [state.get(self.names[i], nothing) for i in self.normalized]
        columns = [[row[key] for row in rows] for key in ("count", "mean", "m2")]
        self.moments = RunningMoments(*torch.tensor(columns, dtype=torch.float64))


def overlong_share(num_tokens: int, limit: int, buffer_tokens: int) -> float:
    """min(max(n − (L − b), 0), b) / b: 0 up to b tokens before the limit L, 1 at it.

    DAPO subtracts it from the reward (arXiv 2503.14476, equation 13).
    """
    return min(max(num_tokens - (limit - buffer_tokens), 0), buffer_tokens) / buffer_tokens
