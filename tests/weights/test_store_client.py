"""A weight hub whose process died has its state again, and nobody takes a blank one for a fresh one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from rayrlhf.weights.store import HubIsBlank, HubState, Publication, WeightHub
from rayrlhf.weights.store_client import HubClient


def blank(checkpoint_version: int = 0) -> WeightHub:
    hub = WeightHub(checkpoint_version=checkpoint_version)
    hub.state = None
    return hub


def test_28_a_blank_hub_answers_nobody() -> None:
    """Else an engine that starts would take the checkpoint for the newest policy."""
    hub = blank()
    for ask in (hub.newest, hub.is_engines_turn, hub.ping, lambda: hub.announce(1), lambda: hub.is_coming(1)):
        with pytest.raises(HubIsBlank):
            ask()
    hub.record("engine 0", "may be written down all the same")


def test_28_it_goes_on_with_what_it_is_given() -> None:
    hub = blank()
    hub.restore(HubState(Publication(3, 9, []), (4, 10), engines_turn=False))
    assert hub.newest() == Publication(3, 9, []) and not hub.is_engines_turn()
    assert hub.is_coming(10) and not hub.is_coming(11)
    assert hub.announce(11) == 5
    hub.restore(HubState(Publication(0, 0, []), (0, 0)))
    assert hub.newest().number == 3, "what it knows it keeps"


@pytest.mark.parametrize("checkpoint_version", [0, -1])
def test_28_after_both_died_publications_count_from_above_all_that_engines_hold(
    checkpoint_version: int,
) -> None:
    before = int(time.time() * 1000)
    hub = blank(checkpoint_version)
    hub.restore(None)
    number = hub.newest().number
    assert number >= before and hub.newest().version == checkpoint_version
    assert hub.is_coming(0) == (checkpoint_version < 0)
    assert hub.announce(1) > number


@pytest.fixture
def hub(ray_session: None) -> Iterator[Any]:
    actor: Any = ray.remote(WeightHub).options(num_cpus=0, max_restarts=-1).remote()
    yield actor
    ray.kill(actor)


@pytest.mark.ray
def test_28_a_killed_hub_is_given_its_state_by_itself(hub: Any) -> None:
    """By SIGKILL of its process, while no trainer asks it for anything."""
    client = HubClient(hub, timeout_seconds=60)
    number = client.announce(4)
    client.publish(Publication(number, 4, [([], ray.put(b"weights"))]))
    client.set_turn(False)
    pid: Any = ray.get(hub.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    while True:  # as an engine asks
        assert time.monotonic() - started < 120
        try:
            newest: Any = ray.get(hub.newest.remote(), timeout=60)
            break
        except (HubIsBlank, ActorUnavailableError):
            time.sleep(0.1)
    print(f"a killed hub was back after {time.monotonic() - started:.1f} s")
    assert (newest.number, newest.version) == (1, 4) and ray.get(newest.buckets[0][1]) == b"weights"
    assert client.call("is_engines_turn") is False and client.num_restored == 1
    assert client.announce(5) == 2
    client.close()
