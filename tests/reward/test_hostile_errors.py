"""Number 21: what rewards and environments raise is harmless in every message and log that quotes it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.environments.user_environment import EnvironmentFailure, UserEnvironment
from rayrlhf.reward.client import RewardClient, RewardFailure, RewardSource
from rayrlhf.reward.items import Failure
from rayrlhf.samples import Sample
from tests.hostile_text import HOSTILE, assert_harmless
from tests.samples import make_config, make_sample


@pytest.mark.parametrize("answer", [ValueError(HOSTILE), [Failure(f"ValueError: {HOSTILE}")]])
def test_21_a_reward_that_raises_a_response(answer: Any) -> None:
    async def score(_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    handle = SimpleNamespace(score=SimpleNamespace(remote=score))
    config = make_config(reward={"retries": 0}).reward
    client = RewardClient([RewardSource("r", 1.0, handle)], config)
    samples: list[Sample] = [make_sample()]
    asyncio.run(client.score(samples))
    with pytest.raises(RewardFailure) as failed:
        client.check(1, 1)
    assert_harmless(str(failed.value))
    [reason] = client.drain_failures().values()
    assert_harmless(reason)
    assert ":smile:" in reason and "ValueError: " in reason


def test_21_an_environment_that_raises_a_response() -> None:
    class Raises:
        def reset(self, row: dict[str, Any]) -> str:
            raise ValueError(HOSTILE)

    environment = UserEnvironment(Raises, {})
    with pytest.raises(EnvironmentFailure) as failed:
        asyncio.run(environment.reset({}))
    assert_harmless(str(failed.value))
    assert ":smile:" in str(failed.value) and "reset() raised ValueError: " in str(failed.value)
