"""A weight store is restored after its process died; until then it answers no caller."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from rayrlhf.weights.store import Publication, StoreNotRestored, StoreState, WeightStore
from rayrlhf.weights.store_client import StoreClient


def unrestored(checkpoint_version: int = 0) -> WeightStore:
    weight_store = WeightStore(checkpoint_version=checkpoint_version)
    weight_store.state = None
    return weight_store


def test_28_a_store_that_is_not_restored_answers_no_caller() -> None:
    """Otherwise a starting engine would take the checkpoint for the latest policy."""
    weight_store = unrestored()
    calls = (
        weight_store.latest,
        weight_store.engines_own_memory,
        weight_store.ping,
        lambda: weight_store.announce(1),
        lambda: weight_store.is_coming(1),
    )
    for call in calls:
        with pytest.raises(StoreNotRestored):
            call()
    weight_store.record("engine 0", "may be recorded nevertheless")


def test_28_it_continues_from_the_restored_state() -> None:
    weight_store = unrestored()
    weight_store.restore(StoreState(Publication(3, 9, []), (4, 10), engines_own_memory=False))
    assert weight_store.latest() == Publication(3, 9, []) and not weight_store.engines_own_memory()
    assert weight_store.is_coming(10) and not weight_store.is_coming(11)
    assert weight_store.announce(11) == 5
    weight_store.restore(StoreState(Publication(0, 0, []), (0, 0)))
    assert weight_store.latest().number == 3, "existing state is kept"


@pytest.mark.parametrize("checkpoint_version", [0, -1])
def test_28_after_both_died_publications_are_numbered_above_any_that_engines_hold(
    checkpoint_version: int,
) -> None:
    before = int(time.time() * 1000)
    weight_store = unrestored(checkpoint_version)
    weight_store.restore(None)
    number = weight_store.latest().number
    assert number >= before and weight_store.latest().version == checkpoint_version
    assert weight_store.is_coming(0) == (checkpoint_version < 0)
    assert weight_store.announce(1) > number


@pytest.fixture
def weight_store(ray_session: None) -> Iterator[Any]:
    actor: Any = ray.remote(WeightStore).options(num_cpus=0, max_restarts=-1).remote()
    yield actor
    ray.kill(actor)


@pytest.mark.ray
def test_28_a_killed_store_is_restored_without_a_call(weight_store: Any) -> None:
    """By SIGKILL of its process, while no trainer calls it."""
    client = StoreClient(weight_store, timeout_seconds=60)
    number = client.announce(4)
    client.publish(Publication(number, 4, [([], ray.put(b"weights"))]))
    client.set_engines_own_memory(False)
    pid: Any = ray.get(weight_store.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    while True:  # as an engine calls it
        assert time.monotonic() - started < 120
        try:
            latest: Any = ray.get(weight_store.latest.remote(), timeout=60)
            break
        except (StoreNotRestored, ActorUnavailableError):
            time.sleep(0.1)
    print(f"a killed store was restored after {time.monotonic() - started:.1f} s")
    assert (latest.number, latest.version) == (1, 4) and ray.get(latest.buckets[0][1]) == b"weights"
    assert client.call("engines_own_memory") is False and client.num_restored == 1
    assert client.announce(5) == 2
    client.close()
