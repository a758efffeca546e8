"""Raw rewards from several sources, through handles that answer as Serve's do: with something to await."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rayrlhf.config.reward import RewardConfig
from rayrlhf.reward import client as score_module
from rayrlhf.reward.client import RewardClient, RewardFailure, RewardSource, backoff_seconds
from rayrlhf.reward.items import LARGEST_REWARD, Failure, ScoreItem, Unverified
from rayrlhf.samples import Sample
from tests.samples import make_prompt, make_sample

Rewards = list[float | None]


class Handle:
    """Answers request n with `answers[n]`, then with the last: rewards, an error, or an async function."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.requests: list[list[ScoreItem]] = []
        self.score = self

    def remote(self, items: list[ScoreItem]) -> Any:
        self.requests.append(items)
        answer: Any = self.answers[min(len(self.requests), len(self.answers)) - 1]

        async def answered() -> Any:
            if isinstance(answer, Exception):
                raise answer
            if inspect.iscoroutinefunction(answer):
                return await answer(items)
            return answer

        return answered()

    @property
    def responses(self) -> list[list[str]]:
        return [[item.response for item in items] for items in self.requests]


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "BACKOFF_SECONDS", 0.0)


def client(*handles: Handle | None, **config: Any) -> RewardClient:
    sources = [RewardSource(f"source{i}", 1.0, handle) for i, handle in enumerate(handles)]
    source = {"type": "function", "function": "rewards:length"}
    return RewardClient(sources, RewardConfig.model_validate({"sources": [source], **config}))


def samples(count: int = 2, **fields: Any) -> list[Sample]:
    return [make_sample(response=f"r{i}", score=None, **fields) for i in range(count)]


def rewards_of(rewards: RewardClient, asked: list[Sample]) -> list[tuple[float | None, ...]]:
    scored = asyncio.run(rewards.score(asked))
    assert [sample.response for sample in scored] == [sample.response for sample in asked]
    assert all(sample.score is None for sample in scored), "the score is the combiner's"
    return [sample.source_rewards for sample in scored]


def test_raw_rewards_in_the_order_of_sources_and_samples() -> None:
    rewards = client(Handle([1.0, 2.0]), Handle([10.0, -4.0]))
    assert rewards_of(rewards, samples()) == [(1.0, 10.0), (2.0, -4.0)]
    assert rewards.drain_failures() == {}


def test_a_single_sample_and_none_at_all() -> None:
    assert rewards_of(client(Handle([3.0])), samples(1)) == [(3.0,)]
    assert rewards_of(client(Handle([])), []) == []


def test_a_source_sees_prompt_response_and_tokens() -> None:
    handle = Handle([0.0])
    prompt = make_prompt([5, 6], label="yes")
    asyncio.run(client(handle).score([make_sample([7, 8], prompt=prompt, response="cd", score=None)]))
    assert handle.requests == [[ScoreItem(prompt, "cd", [5, 6, 7, 8], attempt=0)]]


def test_turns_count_requests_and_retries_have_the_next_one() -> None:
    handle = Handle([None], [None], [1.0], [1.0])
    rewards = client(handle, retries=2)

    async def both() -> None:
        await rewards.score(samples(1))
        await rewards.score(samples(1))

    asyncio.run(both())
    # The first sample has attempt 0 and its two retries 1 and 2; the second begins at attempt 1.
    assert [items[0].attempt for items in handle.requests] == [0, 1, 2, 1]


def test_the_environment_needs_no_handle() -> None:
    plain = samples(3)
    asked = [
        replace(plain[0], episode_reward=2.5),
        replace(plain[1], failure="its step took 9 s"),
        replace(plain[2], episode_reward=math.nan),
    ]
    rewards = client(None, Handle([1.0, 1.0], [1.0]))
    assert rewards_of(rewards, asked[:2]) == [(2.5, 1.0), (None, 1.0)]
    assert rewards.drain_failures() == {"source0": "1 samples failed: its step took 9 s"}
    assert rewards_of(rewards, asked[2:]) == [(None, 1.0)]
    assert rewards_of(rewards, plain[:1]) == [(None, 1.0)]
    assert rewards.drain_failures() == {"source0": "2 samples failed: the environment gave no reward"}


@pytest.mark.parametrize(
    "failure",
    [None, math.nan, math.inf, -math.inf, 10 * LARGEST_REWARD, "0.5", [1.0], Failure("no such row")],
)
def test_only_what_failed_is_asked_again(failure: Any) -> None:
    handle = Handle([1.0, failure, 3.0], [2.0])
    rewards = client(handle)
    assert rewards_of(rewards, samples(3)) == [(1.0,), (2.0,), (3.0,)]
    assert handle.responses == [["r0", "r1", "r2"], ["r1"]]
    assert rewards.drain_failures() == {}


def test_a_request_that_raised_is_asked_again_whole() -> None:
    handle = Handle(ConnectionError("replica gone"), [1.0, 2.0])
    assert rewards_of(client(handle), samples()) == [(1.0,), (2.0,)]
    assert len(handle.requests) == 2


def test_what_fails_for_good_is_none_and_counted_by_source() -> None:
    broken, healthy = Handle([None, 1.0], [None]), Handle([1.0, 1.0])
    rewards = client(broken, healthy, retries=2)
    assert rewards_of(rewards, samples()) == [(None, 1.0), (1.0, 1.0)]
    assert len(broken.requests) == 3 and len(healthy.requests) == 1
    assert rewards.drain_failures() == {"source0": "1 samples failed: returned None, which is not a number"}
    assert rewards.drain_failures() == {}


def test_failures_of_single_samples_add_up() -> None:
    rewards = client(Handle([None]), retries=0)

    async def one_by_one() -> None:
        await asyncio.gather(*(rewards.score([sample]) for sample in samples(7)))

    asyncio.run(one_by_one())
    assert rewards.drain_failures()["source0"].startswith("7 samples failed")


def test_retries_wait_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(score_module, "BACKOFF_SECONDS", 0.5)
    monkeypatch.setattr(score_module.asyncio, "sleep", sleep)
    rewards_of(client(Handle([None]), retries=3), samples(1))
    for waited, longest in zip(waits, [0.5, 1.0, 2.0], strict=True):
        assert longest / 2 < waited <= longest


def test_the_jitter_is_a_samples_own_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "BACKOFF_SECONDS", 1.0)
    waits = [backoff_seconds("judge", make_sample(sample_index=i), 1) for i in range(20)]
    assert waits == [backoff_seconds("judge", make_sample(sample_index=i), 1) for i in range(20)]
    assert len(set(waits)) == 20 and all(0.5 < wait <= 1.0 for wait in waits)
    assert backoff_seconds("judge", make_sample(), 100) <= score_module.MAX_BACKOFF_SECONDS


def test_a_source_that_does_not_answer_is_given_up() -> None:
    async def never(items: list[ScoreItem]) -> Rewards:
        await asyncio.Event().wait()
        return []

    rewards = client(Handle(never), Handle([1.0, 1.0]), timeout_seconds=0.02, retries=1)
    assert rewards_of(rewards, samples()) == [(None, 1.0), (None, 1.0)]
    reason = "no answer within reward.timeout_seconds=0.02"
    with pytest.raises(RewardFailure, match=f"Last error: source0: {reason}"):
        rewards.check(2, 2)
    assert rewards.drain_failures() == {"source0": f"2 samples failed: {reason}"}


def test_sources_are_asked_side_by_side() -> None:
    async def both_asked() -> list[tuple[float | None, ...]]:
        arrived = asyncio.Barrier(2)

        def meets(reward: float) -> Callable[[list[ScoreItem]], Any]:
            async def answer(items: list[ScoreItem]) -> Rewards:
                await arrived.wait()
                return [reward]

            return answer

        rewards = client(Handle(meets(1.0)), Handle(meets(2.0)), timeout_seconds=10, retries=0)
        return [sample.source_rewards for sample in await rewards.score(samples(1))]

    assert asyncio.run(both_asked()) == [(1.0, 2.0)]


def test_a_run_stops_when_too_many_fail() -> None:
    rewards = client(Handle(ValueError("Traceback:\n  many lines\nValueError: no such word")), retries=1)
    assert rewards_of(rewards, samples(3)) == [(None,)] * 3
    rewards.check(1, 10)  # 0.1 of them, as many as allowed
    with pytest.raises(RewardFailure) as caught:
        rewards.check(2, 10)
    assert str(caught.value) == (
        "2 of 10 samples could not be scored after 1 retries (reward.max_failed_fraction=0.1). "
        "Last error: source0: ValueError: ValueError: no such word"
    )


@pytest.mark.parametrize(
    "answer, message",
    [
        ([None], "source0: returned None, which is not a number"),
        ([math.nan], "source0: returned nan, which is not finite"),
        ([1e20], "source0: returned 1e+20, which is beyond 1e+18"),
        ([Failure("row 3 has no answer")], "source0: row 3 has no answer"),
        ([1.0, 2.0], "source0: returned 2 rewards for 1 responses"),
        (ValueError(), "source0: ValueError()"),
    ],
)
def test_the_last_error_says_what_came_back(answer: Any, message: str) -> None:
    rewards = client(Handle(answer), retries=0)
    rewards_of(rewards, samples(1))
    with pytest.raises(RewardFailure, match=r"Last error: ") as caught:
        rewards.check(1, 1)
    assert str(caught.value).endswith(f"Last error: {message}")


def test_another_ranks_failures_stop_this_one_too() -> None:
    with pytest.raises(RewardFailure, match="Last error: on another rank"):
        client(Handle([1.0])).check(5, 10)


def test_no_failure_is_allowed_at_zero() -> None:
    rewards = client(Handle([1.0]), max_failed_fraction=0.0)
    rewards.check(0, 10)
    with pytest.raises(RewardFailure):
        rewards.check(1, 1000)


def test_what_is_lost_for_good_is_not_asked_again() -> None:
    """A call that has ended the process of the user's function would do so again."""
    handle = Handle([Failure("it ended its own process", final=True), None], [2.0])
    rewards = client(handle, retries=2)
    assert rewards_of(rewards, samples(2)) == [(None,), (2.0,)]
    assert handle.responses == [["r0", "r1"], ["r1"]]
    failures = rewards.drain_failures()
    assert failures["source0"].startswith("1 samples failed")


def test_answers_that_could_not_be_verified_are_counted() -> None:
    rewards = client(Handle([Unverified(-1.0, "grading took longer than 2 s"), 1.0]))
    assert rewards_of(rewards, samples(2)) == [(-1.0,), (1.0,)]
    assert rewards.drain_failures() == {}
    assert (rewards.drain_unverified(), rewards.drain_unverified()) == (1, 0)
