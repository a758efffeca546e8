"""From prompts to samples with raw rewards: what a worker asks of engines, environments and rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rayrlhf.config.rollout import SamplingConfig
from rayrlhf.reward.client import RewardClient
from rayrlhf.rollout.background import Background
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.samples import Prompt, Sample

Numbered = tuple[int, Prompt]  # group id, prompt


class Collector:
    """Asks for groups of samples. One is scored as soon as it is finished, while others are generated."""

    def __init__(self, rollouts: RolloutClient, rewards: RewardClient) -> None:
        self.rollouts = rollouts
        self.rewards = rewards
        self.background = Background()

    async def group(
        self, numbered: Numbered, version: int, *, group_size: int, sampling: SamplingConfig
    ) -> list[Sample]:
        """The samples of one prompt, in the order of their indices, by weights of at least `version`."""
        group_id, prompt = numbered
        scoring: list[asyncio.Task[list[Sample]]] = []
        try:
            async for sample in self.rollouts.samples(
                prompt, group_id=group_id, group_size=group_size, min_version=version, sampling=sampling
            ):
                scoring.append(asyncio.ensure_future(self.rewards.score([sample])))
            scored = await asyncio.gather(*scoring)
        finally:
            for task in scoring:
                task.cancel()  # does nothing to one that is done
        return sorted((sample for [sample] in scored), key=lambda sample: sample.sample_index)

    def collect(
        self,
        prompts: Sequence[Numbered],
        *,
        version: int,
        group_size: int,
        sampling: SamplingConfig,
        on_group: Callable[[int], None] = lambda done: None,
    ) -> list[Sample]:
        """The groups of all prompts, in their order; waits for them. `on_group` hears how many are done."""

        async def everything() -> list[Sample]:
            groups = [
                asyncio.ensure_future(self.group(numbered, version, group_size=group_size, sampling=sampling))
                for numbered in prompts
            ]
            try:
                for done, group in enumerate(asyncio.as_completed(groups), start=1):
                    await group
                    on_group(done)
            finally:
                for group in groups:
                    group.cancel()
            return [sample for group in groups for sample in group.result()]

        return self.background.run(everything())
