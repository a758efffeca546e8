"""Which weights an engine loads, and when it waits for the trainers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rayrlhf.rollout import engine as engine_module
from rayrlhf.rollout.engine import WEIGHTS_INVALID, EngineActor, EngineSettings
from rayrlhf.weights.store import Publication, WeightStore
from tests.placement.test_memory_turns import Remote


class Stepper:
    """Stands for vLLM's: notes which weights were loaded."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def start_weight_update(self, *, verify: bool = False) -> None: ...

    async def load_bucket(self, slices: Any, bucket: Any) -> None:
        self.loaded.append(bucket)

    async def finish_weight_update(self, version: int) -> None: ...


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RETRY_SECONDS", 0.01)


def engine_of(store: WeightStore, *, seconds: float = 5.0) -> Any:
    engine = EngineActor(EngineSettings({}, {}, None, 5.0, seconds))
    engine.weight_store, engine.stepper, engine.name = Remote(store), Stepper(), "engine 0"
    return engine


def published(number: int, version: int) -> Publication:
    async def weights() -> str:
        return f"weights of version {version}"

    bucket: Any = ([], weights())
    return Publication(number, version, [bucket])


def while_waiting(waiting: Any, then: Callable[[], Any]) -> Any:
    async def run() -> Any:
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0.05)
        assert not task.done()
        happened = then()
        if happened is not None:
            await happened
        return await asyncio.wait_for(task, 5)

    return asyncio.run(run())


def test_what_was_pushed_is_asked_for_and_awaited() -> None:
    store = WeightStore()
    engine = engine_of(store)
    number = store.announce(3)  # and sent to the other engines directly
    assert not store.take_wanted()
    asked: list[bool] = []

    def publish() -> None:
        asked.append(store.take_wanted())
        store.publish(published(number, 3))

    assert while_waiting(engine.catch_up(3), publish) == 3
    assert asked == [True] and engine.stepper.loaded == ["weights of version 3"]
    assert asyncio.run(engine.catch_up(3)) == 3
    assert len(engine.stepper.loaded) == 1, "what it holds it loads no second time"


def test_what_is_published_between_two_questions_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store says that nothing newer is there, and then that nothing is to come: it has just come."""
    store = WeightStore()
    engine = engine_of(store)
    number, is_coming = store.announce(3), store.is_coming

    def just_published(version: int) -> bool:
        if store.latest().number < number:
            store.publish(published(number, 3))
        return is_coming(version)

    monkeypatch.setattr(store, "is_coming", just_published)
    assert asyncio.run(engine.catch_up(3)) == 3
    assert engine.stepper.loaded == ["weights of version 3"]


def test_a_direct_push_ends_the_wait() -> None:
    """The trainers have begun to change the weights: it is the next version that comes."""
    store = WeightStore()
    engine = engine_of(store)
    store.announce(3)

    async def receive() -> None:
        number = store.announce(4)
        async with engine.updating:  # as `receive`, which must not wait for the one who waits
            engine.publication, engine.version = number, 4

    assert while_waiting(engine.catch_up(3), receive) == 4
    assert engine.stepper.loaded == []


def test_a_version_that_nobody_announces_is_refused_at_once_and_another_at_the_deadline() -> None:
    store = WeightStore()
    with pytest.raises(RuntimeError, match="version 7 was requested, but the latest published version is 0"):
        asyncio.run(engine_of(store).catch_up(7))
    store.announce(7)
    with pytest.raises(RuntimeError, match="version 7 was requested"):
        asyncio.run(engine_of(store, seconds=0.05).catch_up(7))


def test_older_weights_serve_requests_that_allow_them() -> None:
    store = WeightStore()
    store.publish(published(store.announce(3), 3))
    store.announce(4)
    engine = engine_of(store)
    assert asyncio.run(engine.catch_up(3)) == 3
    assert not store.take_wanted()


def test_weights_of_a_trainer_that_was_restarted_are_the_policy() -> None:
    """It had published version 9 before it died, and resumed from a checkpoint of step 8."""
    store = WeightStore()
    store.publish(published(store.announce(9), 9))
    number = store.announce(8)
    assert store.newest_version() == 8 and store.latest().version == -1
    engine = engine_of(store)
    assert asyncio.run(engine.catch_up(0)) == 0, "a starting engine waits for nothing"
    found = while_waiting(engine.catch_up(8), lambda: store.publish(published(number, 8)))
    assert found == 8 and engine.stepper.loaded == ["weights of version 8"]


def test_an_engine_that_slept_holds_nothing() -> None:
    """Whatever version it held: a push of the same number may have been missed."""
    store = WeightStore()
    store.publish(published(store.announce(2), 2))
    number = store.announce(3)
    engine = engine_of(store)
    engine.version, engine.publication = 3, WEIGHTS_INVALID
    found = while_waiting(
        engine.catch_up(store.newest_version()), lambda: store.publish(published(number, 3))
    )
    assert found == 3 and engine.stepper.loaded == ["weights of version 3"]
