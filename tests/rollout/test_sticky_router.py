"""Requests of a session go to one replica, and spread over all by their queues."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig

from rayrlhf.rollout import sticky_router
from rayrlhf.rollout.engine import STICKY_ROUTER
from rayrlhf.rollout.sticky_router import StickyRouter

NUM_REPLICAS, NUM_SESSIONS, NUM_TURNS = 3, 24, 5


def router_of(*replicas: str) -> StickyRouter:
    router = StickyRouter.__new__(StickyRouter)
    router._replica_of = sticky_router.OrderedDict()
    router._replicas = {name: name for name in replicas}  # pyright: ignore[reportAttributeAccessIssue]
    return router


def choose(router: Any, session: str) -> list[list[str]]:
    request = SimpleNamespace(
        metadata=SimpleNamespace(session_id=session), routing_context=SimpleNamespace(should_backoff=False)
    )
    return asyncio.run(router.choose_replicas(list(router._replicas.values()), request))


def route(router: Any, session: str, replica: str) -> None:
    router.on_request_routed(SimpleNamespace(metadata=SimpleNamespace(session_id=session)), replica, None)


def test_a_known_session_has_one_candidate_and_others_have_two() -> None:
    router = router_of("a", "b", "c")
    route(router, "one", "b")
    route(router, "", "c")
    assert choose(router, "one") == [["b"]]
    for session in ("two", ""):
        [candidates] = choose(router, session)
        assert len(set(candidates)) == 2
    del router._replicas["b"]  # pyright: ignore[reportArgumentType]
    assert set(choose(router, "one")[0]) == {"a", "c"}, "it died: another one takes over"
    assert choose(router_of("a"), "one") == [["a"]]


def test_old_sessions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sticky_router, "MAX_SESSIONS", 2)
    router = router_of("a", "b")
    for session in ("one", "two", "one", "three"):
        route(router, session, "a")
    assert list(router._replica_of) == ["one", "three"]


class Replica:
    async def where(self) -> int:
        await asyncio.sleep(0.05)
        return os.getpid()


@pytest.fixture(scope="module")
def replicas(ray_session: None) -> Iterator[Any]:
    deployment = serve.deployment(Replica).options(
        num_replicas=NUM_REPLICAS,
        max_ongoing_requests=8,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        request_router_config=RequestRouterConfig(request_router_class=STICKY_ROUTER),
    )
    yield serve.run(deployment.bind(), name="sticky", route_prefix=None)
    serve.delete("sticky")


async def turns(handle: Any, session: str, count: int = NUM_TURNS) -> list[int]:
    options = handle.options(session_id=session)
    return [await options.where.remote() for _ in range(count)]


async def all_turns(handle: Any) -> list[list[int]]:
    return list(await asyncio.gather(*(turns(handle, f"session {i}") for i in range(NUM_SESSIONS))))


@pytest.mark.ray
@pytest.mark.slow
def test_behind_serve(replicas: Any) -> None:
    places = asyncio.run(all_turns(replicas))
    assert all(len(set(pids)) == 1 for pids in places), "all turns of an episode at one engine"
    of_sessions = Counter(pids[0] for pids in places)
    assert len(of_sessions) == NUM_REPLICAS and max(of_sessions.values()) <= NUM_SESSIONS // 2, of_sessions
    victim = places[0][0]
    os.kill(victim, signal.SIGKILL)

    async def after() -> int:
        for _ in range(100):
            try:
                return (await turns(replicas, "session 0", 1))[0]
            except Exception:
                await asyncio.sleep(0.2)
        raise AssertionError("nobody answers")

    assert asyncio.run(after()) != victim
