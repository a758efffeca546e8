"""Engines start alone on their GPUs; a lease ends with its process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayrlhf.placement import memory_turns
from rayrlhf.placement.memory_turns import (
    LEASE_SECONDS,
    Lease,
    MemoryTurns,
    TurnsNotKnown,
    renewal_seconds,
)
from rayrlhf.weights.store import Publication, StoreState, WeightStore


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_engine_starts_when_nothing_else_loads_on_its_slots() -> None:
    turns = MemoryTurns()
    assert turns.claim("reward 0", [0], "loading")
    assert turns.claim("ref 0", [0], "loading"), "models that measure nothing load side by side"
    assert not turns.claim("engine 0", [0, 1], "starting")
    assert turns.claim("engine 1", [2, 3], "starting"), "on other slots"
    assert not turns.claim("reward 1", [3], "loading"), "an engine starts there"
    turns.end("reward 0")
    assert not turns.claim("engine 0", [0, 1], "starting"), "one model still loads"
    turns.end("ref 0")
    assert turns.claim("engine 0", [0, 1], "starting")
    turns.move_to("engine 1", "awake")
    assert turns.claim("reward 1", [3], "loading"), "an engine that is up keeps what it has"


def test_engines_hold_memory_until_they_are_asleep_or_gone() -> None:
    clock = Clock()
    turns = MemoryTurns(clock=clock)
    turns.claim("engine 0", [0], "starting")
    turns.claim("engine 1", [1], "starting")
    turns.claim("reward 0", [2], "loading")
    turns.move_to("engine 0", "awake")
    assert turns.engines_up() == {"engine 0": "awake", "engine 1": "starting"}
    turns.move_to("engine 0", "asleep")
    clock.now += LEASE_SECONDS - 1
    turns.renew("engine 0", [0], "awake")
    assert turns.engines_up() == {"engine 1": "starting"}, "a renewal changes no stage"
    clock.now += 1
    assert turns.engines_up() == {}, "engine 1 died: nothing renews its lease"
    turns.move_to("engine 0", "awake")
    assert turns.engines_up() == {"engine 0": "awake"}


@pytest.mark.parametrize(("engines", "interval", "lease"), [(1, 3, 15), (64, 3, 15), (512, 12.8, 64)])
def test_many_engines_renew_their_leases_less_often(engines: int, interval: float, lease: float) -> None:
    assert renewal_seconds(engines) == interval
    clock = Clock()
    turns = MemoryTurns(engines, clock=clock)
    turns.claim("engine 0", [0], "starting")
    clock.now += lease - 0.1
    assert turns.engines_up() == {"engine 0": "starting"}
    clock.now += 0.1
    assert turns.engines_up() == {}


def test_a_move_and_its_event_are_one_call() -> None:
    store = WeightStore(num_engines=512)
    store.claim_turn("engine 0", [0], "starting")
    store.move_turn_to("engine 0", "asleep", ("engine 0", "asleep, 7 bytes freed"))
    assert store.engines_up() == {}
    [event] = store.trace()
    assert (event.who, event.what) == ("engine 0", "asleep, 7 bytes freed")


def test_a_store_that_was_restarted_waits_for_renewals() -> None:
    clock = Clock()
    turns = MemoryTurns(is_restarted=True, clock=clock)
    turns.renew("engine 0", [0], "awake")
    turns.move_to("engine 1", "asleep")
    for ask in (turns.engines_up, lambda: turns.claim("engine 1", [1], "starting")):
        with pytest.raises(TurnsNotKnown):
            ask()
    clock.now += LEASE_SECONDS - 1
    turns.renew("engine 0", [0], "awake")
    clock.now += 1
    assert turns.engines_up() == {"engine 0": "awake"}
    assert turns.claim("engine 1", [1], "starting")


def test_engines_do_not_start_in_the_trainers_turn() -> None:
    store = WeightStore()
    store.set_engines_own_memory(False)
    assert not store.claim_turn("engine 0", [0], "starting")
    assert store.claim_turn("reward 0", [0], "loading")
    store.end_turn("reward 0")
    store.set_engines_own_memory(True)
    assert store.claim_turn("engine 0", [0], "starting")
    assert store.engines_up() == {"engine 0": "starting"}


def test_nothing_is_claimed_from_a_store_without_its_state() -> None:
    store = WeightStore()
    store.state = None
    with pytest.raises(TurnsNotKnown):
        store.claim_turn("engine 0", [0], "starting")
    store.restore(StoreState(Publication(0, 0, []), (0, 0)))
    assert store.claim_turn("engine 0", [0], "starting")


class Remote:
    """Stands for the actor: `store.method.remote(...)`."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            return getattr(self.store, method)(*arguments)

        return type("Method", (), {"remote": staticmethod(remote)})


def test_a_lease_waits_for_its_turn_and_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_turns, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(memory_turns, "RENEW_SECONDS", 0.01)
    store, clock = WeightStore(), Clock()
    store.turns = MemoryTurns(clock=clock)
    store.set_engines_own_memory(False)

    async def run() -> None:
        lease = Lease(Remote(store), "engine 0", [0])
        waiting = asyncio.create_task(lease.claim("starting"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        store.set_engines_own_memory(True)
        await asyncio.wait_for(waiting, 5)
        for _ in range(3):
            clock.now += LEASE_SECONDS - 1
            await asyncio.sleep(0.05)
        assert store.engines_up() == {"engine 0": "starting"}
        store.turns = MemoryTurns(clock=clock)
        await asyncio.sleep(0.05)
        assert store.engines_up() == {"engine 0": "awake"}, "what a new store must expect"
        await lease.end()
        assert store.engines_up() == {}

    asyncio.run(run())
