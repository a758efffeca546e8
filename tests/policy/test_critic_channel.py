"""Calls between actor ranks and critic ranks arrive in one order for all, whichever side restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from rayrlhf.algorithms.metrics import Metrics, Sum
from rayrlhf.policy.critic_channel import Answer, CriticChannel, CriticFailed, Kind, Part, Request, Share
from rayrlhf.policy.critic_client import RemoteCritic

OF_RANK_0 = Metrics({"loss/critic_bad_steps": Sum(4.0)})


def part(name: str) -> Part:
    batch: Any = name
    return Part(batch, num_tokens=1)


class Actor:
    """An incarnation of the actor's workers."""

    def __init__(self, channel: CriticChannel, started: int, size: int = 1) -> None:
        self.channel, self.started, self.size = channel, started, size
        self.numbers = [0] * size

    def ask(self, rank: int, kind: Kind, *parts: str) -> asyncio.Task[Answer]:
        number, self.numbers[rank] = self.numbers[rank], self.numbers[rank] + 1
        asked = self.channel.ask(
            self.started, self.size, number, rank, Request(kind), [part(name) for name in parts]
        )
        return asyncio.ensure_future(asked)


async def fetch(channel: CriticChannel, started: int, rank: int) -> tuple[str, list[Any]]:
    call = await asyncio.wait_for(channel.next(started, rank), 5)
    assert call is not None
    request, share = call
    return request.kind, [part.batch for part in share.parts.values()]


async def refused(asked: asyncio.Task[Answer]) -> str:
    with pytest.raises(CriticFailed) as failed:
        await asyncio.wait_for(asked, 5)
    return str(failed.value)


def test_a_call_is_delivered_when_all_actor_ranks_have_posted_and_to_all_critic_ranks() -> None:
    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 2)
        actor = Actor(channel, started=1, size=2)
        late = actor.ask(1, "values", "c")
        waiting = asyncio.ensure_future(fetch(channel, 10, 0))
        await asyncio.sleep(0.01)
        assert not waiting.done(), "rank 0 of the actor has not posted"
        first = actor.ask(0, "values", "a", "b")
        assert await waiting == ("values", ["a"])
        assert await fetch(channel, 10, 1) == ("values", ["b", "c"])
        # Here references to the values are their names.
        values: list[Any] = ["of a", "of b", "of c"]
        await channel.answer(10, 0, Answer({0: values[0]}, OF_RANK_0))
        assert not first.done()
        await channel.answer(
            10, 1, Answer({1: values[1], 2: values[2]}, Metrics({"loss/critic_bad_steps": Sum(5.0)}))
        )
        assert await first == Answer({0: values[0], 1: values[1]}, OF_RANK_0)
        assert await late == Answer({0: values[2]}, OF_RANK_0)

    asyncio.run(body())


def test_critic_ranks_get_balanced_shares_and_as_many_micro_batches_each() -> None:
    """Not all 4,096 of them, which the channel would serialise 512 times."""

    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 2)
        tokens = [60, 20, 20, 30]
        parts = [Part(part("").batch, num_tokens=count) for count in tokens]
        asked = [
            asyncio.ensure_future(
                channel.ask(1, 2, 0, rank, Request("values"), parts[2 * rank : 2 * rank + 2])
            )
            for rank in range(2)
        ]
        await asyncio.sleep(0)
        shares: list[Share] = []
        for rank in range(2):
            call = await channel.next(10, rank)
            assert call is not None
            shares.append(call[1])
        assert [list(share.parts) for share in shares] == [[0], [1, 2, 3]]
        assert [share.num_batches for share in shares] == [3, 3]
        channel.fail("RuntimeError", "over")
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(body())


def test_calls_come_in_the_order_in_which_they_were_made() -> None:
    async def body() -> None:
        channel = CriticChannel()
        actor = Actor(channel, started=1)
        asked = [actor.ask(0, "values"), actor.ask(0, "update")]
        await asyncio.sleep(0)
        await channel.join(10, 1)  # a critic that comes up later finds them
        for kind in ("values", "update"):
            assert (await fetch(channel, 10, 0))[0] == kind
            await channel.answer(10, 0, Answer())
        assert [await ask for ask in asked] == [Answer(), Answer()]

    asyncio.run(body())


def test_a_restart_of_the_critic_breaks_the_session_and_the_next_one_goes_on() -> None:
    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 1)
        actor = Actor(channel, started=1)
        begun = actor.ask(0, "begin")
        await fetch(channel, 10, 0)
        await channel.answer(10, 0, Answer())
        await begun
        unanswered = actor.ask(0, "update")
        await asyncio.sleep(0)
        await channel.join(20, 1)
        assert "workers were restarted" in await refused(unanswered)
        assert "workers were restarted" in await refused(actor.ask(0, "update")), "and so does the rest"
        with pytest.raises(CriticFailed):
            await channel.next(10, 0)  # a straggler of the old incarnation
        restarted = Actor(channel, started=2).ask(0, "begin")
        assert await fetch(channel, 20, 0) == ("begin", [])
        await channel.answer(20, 0, Answer())
        assert await restarted == Answer()

    asyncio.run(body())


def test_28_when_its_process_dies_both_sides_restart_and_go_on() -> None:
    """A new channel knows neither side. Nobody may go on with it as if nothing had been lost: the critic's
    workers may have died too. What begins with it is served.
    """

    async def body() -> None:
        # After the death of another one, with which actor 1 and critic 10 had begun.
        channel = CriticChannel()
        actor = Actor(channel, started=1)
        actor.numbers = [7]
        assert "between actor and critic died" in await refused(actor.ask(0, "update"))
        with pytest.raises(CriticFailed, match="between actor and critic died"):
            await channel.next(10, 0)
        await channel.answer(10, 0, Answer())  # no pending call
        restarted = Actor(channel, started=2).ask(0, "begin")
        await channel.join(20, 1)
        assert await fetch(channel, 20, 0) == ("begin", [])
        await channel.answer(20, 0, Answer())
        assert await restarted == Answer()

    asyncio.run(body())


def test_a_restart_of_the_critic_is_reported_even_when_nothing_waits() -> None:
    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 1)
        actor = Actor(channel, started=1)
        begun = actor.ask(0, "begin")
        await fetch(channel, 10, 0)
        await channel.answer(10, 0, Answer())
        await begun
        await channel.join(20, 1)
        assert "workers were restarted" in await refused(actor.ask(0, "values"))

    asyncio.run(body())


def test_a_critic_that_restarts_before_it_was_asked_breaks_nothing() -> None:
    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 1)
        begun = Actor(channel, started=1).ask(0, "begin")
        await asyncio.sleep(0)
        await channel.join(20, 1)
        assert await fetch(channel, 20, 0) == ("begin", [])
        await channel.answer(20, 0, Answer())
        assert await begun == Answer()

    asyncio.run(body())


def test_a_call_that_one_critic_rank_has_fetched_reaches_the_other_after_a_restart_of_the_actor() -> None:
    """They run collectives in it: one alone would wait for ever."""

    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 2)
        Actor(channel, started=1).ask(0, "update", "a")
        await asyncio.sleep(0)
        assert await fetch(channel, 10, 0) == ("update", ["a"])
        incomplete = Actor(channel, started=2, size=2)
        incomplete.ask(0, "begin")
        lost = incomplete.ask(0, "values")
        await asyncio.sleep(0)
        begun = Actor(channel, started=3).ask(0, "begin")
        await asyncio.sleep(0)
        assert await fetch(channel, 10, 1) == ("update", [])
        for rank in (0, 1):
            await channel.answer(10, rank, Answer())
        assert "taken over" in await refused(lost), "half a call goes with the workers that made it"
        for rank in (0, 1):
            assert await fetch(channel, 10, rank) == ("begin", [])
            await channel.answer(10, rank, Answer())
        assert await begun == Answer()

    asyncio.run(body())


def test_a_failure_reaches_every_rank_that_asks() -> None:
    async def body() -> None:
        channel = CriticChannel()
        await channel.join(10, 2)
        asked = Actor(channel, started=1).ask(0, "update")
        await fetch(channel, 10, 0)
        channel.fail("FloatingPointError", "the critic's gradient was not finite")
        await channel.answer(10, 1, Answer())  # the other rank may still be at it
        assert await refused(asked) == "FloatingPointError: the critic's gradient was not finite"
        late = Actor(channel, started=0).ask(0, "begin")
        assert "newer actor workers have taken over" in await refused(late)

    asyncio.run(body())


@pytest.mark.ray
def test_28_a_killed_channel_fails_what_waits_in_one_line(ray_session: None) -> None:
    """By SIGKILL of its process, while an actor rank waits for an answer; the next session is served."""
    channel: Any = ray.remote(CriticChannel).options(num_cpus=0, max_restarts=-1).remote()
    ray.get(channel.join.remote(10, 1))
    critic = RemoteCritic.__new__(RemoteCritic)
    critic.timeout_seconds = 120
    waiting = channel.ask.remote(1, 1, 0, 0, Request("begin"), [])
    pid: Any = ray.get(channel.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CriticFailed, match="between actor and critic died"):
        critic.wait(waiting, "begin")
    deadline = time.monotonic() + 120
    while True:
        try:
            ray.get(channel.join.remote(20, 1), timeout=120)
            break
        except ActorUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    late = channel.ask.remote(1, 1, 3, 0, Request("update"), [])
    with pytest.raises(CriticFailed, match="between actor and critic died"):
        critic.wait(late, "update")
    begun = channel.ask.remote(2, 1, 0, 0, Request("begin"), [])
    request, _ = ray.get(channel.next.remote(20, 0), timeout=120)
    assert request.kind == "begin"
    ray.get(channel.answer.remote(20, 0, Answer()))
    assert critic.wait(begun, "begin") == Answer()
    ray.kill(channel)
