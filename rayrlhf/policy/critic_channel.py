"""Ray actor that relays calls of the actor's workers to a critic in a separate trainer, in one order.

A call is passed to the critic once every actor rank has posted its part, and then to every critic rank, so
that the ranks of a side never run different calls, also after a restart. Each critic rank gets its share of
the micro-batches alone; these and the values are references, whose content does not pass through here.

A restart of the critic loses its training since the last checkpoint: it invalidates the actor's session, and
the actor's workers restart from that checkpoint too. A restart of the actor opens a new session, and the
critic follows its first call. When the channel's own process dies, both sides restart from the checkpoint.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

from ray import ObjectRef

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.data.packing import balanced_partition
from rayrlhf.policy.losses import ValueObjective

NEXT_SECONDS = 30.0  # a critic rank that waits for a call repeats its request after this long
CHANNEL_DIED = "the process between actor and critic died, with their pending calls and answers"

Kind = Literal["begin", "load", "values", "update", "save", "offload", "offload_weights", "reload", "stop"]


@dataclass(frozen=True)
class Request:
    kind: Kind
    step: int = 0
    objective: ValueObjective | None = None  # of an update


class Part(NamedTuple):
    """One micro-batch of a call."""

    batch: ObjectRef  # of a PackedBatch on the CPU
    num_tokens: int


class Share(NamedTuple):
    """A critic rank's micro-batches of a call."""

    parts: dict[int, Part]  # by their numbers in the call
    num_batches: int  # to compute: equally many on every rank, the rest is padding


@dataclass(frozen=True)
class Answer:
    """Answer of one critic rank, or the merged answer of all of them to an actor rank."""

    values: dict[int, ObjectRef] = field(default_factory=dict)  # of a tensor [T], by micro-batch number
    metrics: Metrics = field(default_factory=Metrics)  # over all critic ranks, from rank 0


class Failure(NamedTuple):
    kind: str  # the exception's class
    text: str


class CriticFailed(RuntimeError):
    """The critic lost a worker, or raised: the actor's workers restart from the newest checkpoint."""


class Call:
    """One collective call of the actor's ranks."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.parts: dict[int, list[Part]] = {}  # by actor rank
        self.answers: dict[int, Answer] = {}  # by critic rank
        self.done = asyncio.Event()
        self.failure: Failure | None = None
        self._shares: list[Share] = []

    def share(self, rank: int, world_size: int) -> Share:
        """The micro-batches of a critic rank, balanced by their tokens."""
        if len(self._shares) != world_size:
            parts = [part for other in sorted(self.parts) for part in self.parts[other]]
            numbers = balanced_partition([part.num_tokens for part in parts], world_size)
            most = max(map(len, numbers))
            self._shares = [Share({i: parts[i] for i in of_rank}, most) for of_rank in numbers]
        return self._shares[rank]

    def answer_for(self, rank: int) -> Answer:
        """The values of this actor rank's micro-batches, numbered in the order in which it posted them."""
        first = self._first[rank]
        mine = {i: self._values[first + i] for i in range(len(self.parts[rank])) if first + i in self._values}
        return Answer(mine, self.answers[0].metrics)

    @cached_property
    def _first(self) -> dict[int, int]:
        """By actor rank, the number of its first micro-batch."""
        firsts = accumulate((len(self.parts[rank]) for rank in sorted(self.parts)), initial=0)
        return dict(zip(sorted(self.parts), firsts, strict=False))

    @cached_property
    def _values(self) -> dict[int, ObjectRef]:
        return {number: ref for answer in self.answers.values() for number, ref in answer.values.items()}

    def fail(self, failure: Failure) -> None:
        self.failure = failure
        self.done.set()


class CriticChannel:
    """An async Ray actor. An incarnation of workers is identified by its start time in nanoseconds."""

    def __init__(self) -> None:
        self.actor_started = -1
        self.critic_started = -1
        self.critic_size = 0
        self.posted: dict[int, Call] = {}  # of the actor's incarnation, by number, until all parts are posted
        self.calls: list[Call | None] = []  # complete ones of the critic's incarnation; None once answered
        self.fetched: dict[int, int] = {}  # by critic rank: number of `calls` fetched
        self.broken: Failure | None = None  # why the actor's session is invalid
        self.call_added = asyncio.Event()

    async def ask(
        self, started: int, world_size: int, number: int, rank: int, request: Request, parts: list[Part]
    ) -> Answer:
        """The critic's answer, once every actor rank has posted its part. Raises `CriticFailed`."""
        self._open_session(started, number)
        if self.broken is not None:
            raise CriticFailed(f"{self.broken.kind}: {self.broken.text}")
        call = self.posted.setdefault(number, Call(request))
        call.parts[rank] = parts
        if len(call.parts) == world_size:
            del self.posted[number]
            self.calls.append(call)
            self.call_added.set()
        await call.done.wait()
        if call.failure is not None:
            raise CriticFailed(f"{call.failure.kind}: {call.failure.text}")
        return call.answer_for(rank)

    def _open_session(self, started: int, number: int) -> None:
        if started < self.actor_started:
            raise CriticFailed("RuntimeError: newer actor workers have taken over")
        if started > self.actor_started:
            if number > 0:  # started with a channel that died: the critic's state is lost
                raise CriticFailed(f"RuntimeError: {CHANNEL_DIED}")
            for call in self.posted.values():
                call.fail(Failure("RuntimeError", "newer actor workers have taken over"))
            self.actor_started, self.posted, self.broken = started, {}, None

    async def join(self, started: int, world_size: int) -> None:
        """Register a critic rank."""
        if started <= self.critic_started:
            return
        had_work = any(self.fetched.values())
        self.critic_started, self.critic_size = started, world_size
        if had_work:
            # The training since the checkpoint is lost, even if no call is pending.
            self.fail("RuntimeError", "the critic's workers were restarted")
        self.fetched = dict.fromkeys(range(world_size), 0)

    async def next(self, started: int, rank: int) -> tuple[Request, Share] | None:
        """The next call and this rank's micro-batches of it; None after `NEXT_SECONDS` without one."""
        if started != self.critic_started:
            other = "newer critic workers have taken over" if self.critic_started >= 0 else CHANNEL_DIED
            raise CriticFailed(f"RuntimeError: {other}")
        index = self.fetched[rank]
        if index == len(self.calls):
            self.call_added.clear()
            try:
                await asyncio.wait_for(self.call_added.wait(), NEXT_SECONDS)
            except TimeoutError:
                return None
            return await self.next(started, rank)
        self.fetched[rank] = index + 1
        call = self.calls[index]
        assert call is not None, "a call is answered only after all ranks have fetched it"
        return call.request, call.share(rank, self.critic_size)

    async def answer(self, started: int, rank: int, answer: Answer) -> None:
        """Answer the call that this rank fetched last."""
        index = self.fetched.get(rank, 0) - 1
        if started != self.critic_started or not 0 <= index < len(self.calls):
            return  # the session was invalidated meanwhile
        call = self.calls[index]
        assert call is not None
        call.answers[rank] = answer
        if len(call.answers) == self.critic_size:
            self.calls[index] = None
            call.done.set()

    def fail(self, kind: str, text: str) -> None:
        """Fail all pending calls, and all further ones of the actor's session."""
        self.broken = Failure(kind, text)
        for call in [*self.posted.values(), *self.calls]:
            if call is not None:
                call.fail(self.broken)
        self.posted, self.calls = {}, []
        self.fetched = dict.fromkeys(self.fetched, 0)
