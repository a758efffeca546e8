"""Scores from several sources, through handles that answer as Serve's do: with something to await."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rayrlhf.batch import Prompt, Sample
from rayrlhf.config.reward import RewardConfig
from rayrlhf.reward import score as score_module
from rayrlhf.reward.score import RewardClient, RewardFailure, RewardSource
from tests.samples import make_prompt, make_sample

Rewards = list[float | None]


class Handle:
    """Answers request n with `answers[n]`, then with the last: rewards, an error, or an async function."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.requests: list[tuple[list[Prompt], list[str], list[list[int]]]] = []
        self.score = self

    def remote(self, prompts: list[Prompt], responses: list[str], token_ids: list[list[int]]) -> Any:
        self.requests.append((prompts, responses, token_ids))
        answer: Any = self.answers[min(len(self.requests), len(self.answers)) - 1]

        async def answered() -> Any:
            if isinstance(answer, Exception):
                raise answer
            if inspect.iscoroutinefunction(answer):
                return await answer(responses)
            return answer

        return answered()


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "BACKOFF_SECONDS", 0.0)


def client(*handles: Handle, weights: Sequence[float] | None = None, **config: Any) -> RewardClient:
    sources = [
        RewardSource(f"source{i}", weight, handle)
        for i, (handle, weight) in enumerate(zip(handles, weights or [1.0] * len(handles), strict=True))
    ]
    source = {"type": "function", "function": "rewards:length"}
    return RewardClient(sources, RewardConfig.model_validate({"sources": [source], **config}))


def samples(count: int = 2, **fields: Any) -> list[Sample]:
    return [make_sample(response=f"r{i}", score=None, **fields) for i in range(count)]


def scores(rewards: RewardClient, asked: list[Sample]) -> Rewards:
    scored = asyncio.run(rewards.score(asked))
    assert [sample.response for sample in scored] == [sample.response for sample in asked]
    return [sample.score for sample in scored]


def test_sources_are_weighted_and_added() -> None:
    rewards = client(Handle([1.0, 2.0]), Handle([10.0, -4.0]), weights=[0.5, -0.25])
    assert scores(rewards, samples()) == [0.5 - 2.5, 1.0 + 1.0]
    assert rewards.drain_failures() == {}


def test_a_source_sees_prompts_responses_and_tokens() -> None:
    handle = Handle([0.0])
    prompt = make_prompt([5, 6], label="yes")
    asyncio.run(client(handle).score([make_sample([7, 8], prompt=prompt, response="cd", score=None)]))
    assert handle.requests == [([prompt], ["cd"], [[5, 6, 7, 8]])]


def test_the_sum_is_clipped_not_its_parts() -> None:
    rewards = client(Handle([9.0, -9.0, 9.0]), Handle([-8.0, 0.0, 0.0]), clip=[-2, 3])
    assert scores(rewards, samples(3)) == [1.0, -2.0, 3.0]


def test_a_truncated_response_gets_the_penalty_instead() -> None:
    rewards = client(Handle([5.0, 5.0]), truncation_penalty=-1.0)
    asked = [make_sample(truncated=False, score=None), make_sample(truncated=True, score=None)]
    assert scores(rewards, asked) == [5.0, -1.0]
    assert scores(client(Handle([5.0, 5.0])), asked) == [5.0, 5.0], "null leaves it its own"


@pytest.mark.parametrize("failure", [None, math.nan, math.inf, -math.inf])
def test_only_what_failed_is_asked_again(failure: float | None) -> None:
    handle = Handle([1.0, failure, 3.0], [2.0])
    rewards = client(handle)
    assert scores(rewards, samples(3)) == [1.0, 2.0, 3.0]
    assert [responses for _, responses, _ in handle.requests] == [["r0", "r1", "r2"], ["r1"]]
    assert rewards.drain_failures() == {}


def test_a_request_that_raised_is_asked_again_whole() -> None:
    handle = Handle(ConnectionError("replica gone"), [1.0, 2.0])
    assert scores(client(handle), samples()) == [1.0, 2.0]
    assert len(handle.requests) == 2


def test_what_fails_for_good_is_none_and_counted_by_source() -> None:
    broken, healthy = Handle([None, 1.0], [None]), Handle([1.0, 1.0])
    rewards = client(broken, healthy, retries=2)
    assert scores(rewards, samples()) == [None, 2.0], "no score from a part of the sources"
    assert len(broken.requests) == 3 and len(healthy.requests) == 1
    assert rewards.drain_failures() == {"source0": "1 samples failed: returned None"}
    assert rewards.drain_failures() == {}


def test_a_penalty_does_not_hide_a_failure() -> None:
    rewards = client(Handle([None]), retries=0, truncation_penalty=-1.0)
    assert scores(rewards, samples(1, truncated=True)) == [None]


def test_retries_wait_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(score_module, "BACKOFF_SECONDS", 0.5)
    monkeypatch.setattr(score_module.asyncio, "sleep", sleep)
    scores(client(Handle([None]), retries=3), samples(1))
    assert waits == [0.5, 1.0, 2.0]


def test_a_source_that_does_not_answer_is_given_up() -> None:
    async def never(responses: list[str]) -> Rewards:
        await asyncio.Event().wait()
        return []

    rewards = client(Handle(never), Handle([1.0, 1.0]), timeout_seconds=0.02, retries=1)
    assert scores(rewards, samples()) == [None, None]
    with pytest.raises(RewardFailure, match="Last error: source0: TimeoutError"):
        rewards.check(2, 2)
    assert rewards.drain_failures() == {"source0": "2 samples failed: TimeoutError()"}


def test_sources_are_asked_side_by_side() -> None:
    async def both_asked() -> Rewards:
        arrived = asyncio.Barrier(2)

        def meets(reward: float) -> Callable[[list[str]], Any]:
            async def answer(responses: list[str]) -> Rewards:
                await arrived.wait()
                return [reward]

            return answer

        rewards = client(Handle(meets(1.0)), Handle(meets(2.0)), timeout_seconds=10, retries=0)
        return [sample.score for sample in await rewards.score(samples(1))]

    assert asyncio.run(both_asked()) == [3.0]


def test_a_run_stops_when_too_many_fail() -> None:
    rewards = client(Handle(ValueError("Traceback:\n  many lines\nValueError: no such word")), retries=1)
    assert scores(rewards, samples(3)) == [None] * 3
    rewards.check(1, 10)  # 0.1 of them, as many as allowed
    with pytest.raises(RewardFailure) as caught:
        rewards.check(2, 10)
    assert str(caught.value) == (
        "2 of 10 samples could not be scored after 1 retries (reward.max_failed_fraction=0.1). "
        "Last error: source0: ValueError: ValueError: no such word"
    )


@pytest.mark.parametrize(
    "answer, told",
    [
        ([None], "source0: returned None"),
        ([math.nan], "source0: returned nan"),
        (ValueError(), "source0: ValueError()"),
    ],
)
def test_the_last_error_says_what_came_back(answer: Any, told: str) -> None:
    rewards = client(Handle(answer), retries=0)
    scores(rewards, samples(1))
    with pytest.raises(RewardFailure, match=r"Last error: ") as caught:
        rewards.check(1, 1)
    assert str(caught.value).endswith(f"Last error: {told}")


def test_another_ranks_failures_stop_this_one_too() -> None:
    with pytest.raises(RewardFailure, match="Last error: on another rank"):
        client(Handle([1.0])).check(5, 10)


def test_no_failure_is_allowed_at_zero() -> None:
    rewards = client(Handle([1.0]), max_failed_fraction=0.0)
    rewards.check(0, 10)
    with pytest.raises(RewardFailure):
        rewards.check(1, 1000)
