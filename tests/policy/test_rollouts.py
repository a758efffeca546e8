"""From prompts to samples with raw rewards, with engines and rewards of plain Python."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from rayrlhf.config.rollout import SamplingConfig
from rayrlhf.policy.rollouts import Collector
from rayrlhf.samples import Prompt, Sample
from tests.samples import make_prompt, make_sample

SAMPLING = SamplingConfig(temperature=0.5)


class Rollouts:
    """Answers the first prompt last, and the last sample of a group first."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    async def samples(
        self, prompt: Prompt, *, group_id: int, group_size: int, **call: Any
    ) -> AsyncIterator[Sample]:
        self.calls.append(call)
        for i in reversed(range(group_size)):
            for _ in range(10 - prompt.row_id):
                await asyncio.sleep(0)
            response = f"{prompt.row_id}{i}"
            yield make_sample(prompt=prompt, group_id=group_id, sample_index=i, response=response, score=None)


class Rewards:
    """Scores a response by its own number."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    async def score(self, samples: list[Sample]) -> list[Sample]:
        self.scored += [sample.response for sample in samples]
        return [replace(sample, source_rewards=(float(sample.response),)) for sample in samples]


def collected(rollouts: Any, rewards: Any, on_group: Any = lambda done: None) -> list[Sample]:
    prompts = [(6 + row_id, make_prompt(row_id=row_id)) for row_id in range(3)]
    collector = Collector(rollouts, rewards)
    return collector.collect(prompts, version=2, group_size=2, sampling=SAMPLING, on_group=on_group)


def test_samples_come_in_the_order_of_their_prompts() -> None:
    rollouts, done = Rollouts(), []
    samples = collected(rollouts, Rewards(), done.append)
    assert [sample.response for sample in samples] == ["00", "01", "10", "11", "20", "21"]
    assert [sample.group_id for sample in samples] == [6, 6, 7, 7, 8, 8]
    assert [sample.source_rewards for sample in samples] == [
        (0.0,),
        (1.0,),
        (10.0,),
        (11.0,),
        (20.0,),
        (21.0,),
    ]
    assert rollouts.calls == [{"min_version": 2, "sampling": SAMPLING}] * 3
    assert done == [1, 2, 3]


def test_a_sample_is_scored_before_its_group_is_through() -> None:
    class LastOneWaits(Rollouts):
        """The second sample of a group comes only when the first has been scored."""

        async def samples(self, prompt: Prompt, **call: Any) -> AsyncIterator[Sample]:
            async for sample in super().samples(prompt, **call):
                yield sample
                while sample.response not in rewards.scored:
                    await asyncio.sleep(0.001)

    rewards = Rewards()
    assert len(collected(LastOneWaits(), rewards)) == 6


def test_a_request_that_fails_for_good_ends_the_step() -> None:
    class NoEngines:
        async def samples(self, prompt: Prompt, **_call: Any) -> AsyncIterator[Sample]:
            if prompt.row_id == 1:
                raise TimeoutError("no engine answered")
            await asyncio.Event().wait()
            yield make_sample()

    with pytest.raises(TimeoutError, match="no engine answered"):
        collected(NoEngines(), Rewards())
