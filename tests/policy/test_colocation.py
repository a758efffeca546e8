"""In which order trainers and engines give each other the memory of their slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rayrlhf.policy import colocation
from rayrlhf.policy.colocation import Colocation


class Recorder:
    """Stands for the weights' sender, the ranks and a model; notes the calls."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def engines_sleep(self) -> int:
        self.events.append("engines sleep")
        return 7

    def engines_wake(self, part: str) -> None:
        self.events.append(f"engines wake {part}")

    @contextmanager
    def unread(self) -> Iterator[None]:
        self.events.append("unread")
        yield
        self.events.append("read")

    def record(self, what: str) -> None:
        pass

    def barrier(self) -> None:
        self.events.append("barrier")

    def offload(self) -> None:
        self.events.append("offload")

    def offload_weights(self) -> None:
        self.events.append("offload weights")

    def reload(self) -> None:
        self.events.append("reload")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(colocation, "release_cached_memory", lambda: found.append("release"))
    return found


def turns(
    events: list[str], *, engines_sleep: bool, on_gpu: bool = True, offload_weights: bool = False
) -> tuple[Colocation, Any]:
    recorder: Any = Recorder(events)
    settings: Any = {"engines_sleep": engines_sleep, "on_gpu": on_gpu, "offload_weights": offload_weights}
    return Colocation(recorder, recorder, **settings), recorder


def test_the_cache_wakes_after_every_rank_has_given_back_what_the_push_took(events: list[str]) -> None:
    found, model = turns(events, engines_sleep=True)
    assert found.start_rollouts(lambda: events.append("push"), model, None) is None
    assert events == [
        *("offload", "barrier", "engines wake weights"),
        *("push", "release", "barrier", "engines wake kv_cache"),
    ]


def test_weights_leave_between_the_push_and_the_cache(events: list[str]) -> None:
    """While no thread reads them for an engine that starts late."""
    found, model = turns(events, engines_sleep=True, offload_weights=True)
    found.before_loading()
    events.clear()
    found.start_rollouts(lambda: events.append("push"), model, None)
    assert events == [
        *("offload", "barrier", "engines wake weights"),
        *("push", "unread", "offload weights", "read", "release", "barrier", "engines wake kv_cache"),
    ]
    events.clear()
    found.start_training(model, None)
    assert events == ["engines sleep", "barrier", "unread", "reload", "read"]


def test_weights_come_back_for_a_push_after_a_step_without_training(events: list[str]) -> None:
    found, model = turns(events, engines_sleep=True, offload_weights=True)
    found.before_loading()
    found.start_rollouts(lambda: None, model)
    events.clear()
    found.start_rollouts(lambda: events.append("push"), model)
    assert events[:3] == ["engines sleep", "barrier", "unread"]
    assert events.index("reload") < events.index("push") < events.index("offload weights")


def test_models_come_back_after_the_engines_have_given_their_memory(events: list[str]) -> None:
    found, model = turns(events, engines_sleep=True)
    found.start_training(model, None)
    found.start_training(model, None)
    assert events == ["engines sleep", "barrier", "unread", "reload", "read"], "only once"
    assert found.freed_bytes == 7


def test_engines_that_stay_awake_only_get_the_weights(events: list[str]) -> None:
    found, model = turns(events, engines_sleep=False)
    found.before_loading()
    assert found.start_rollouts(lambda: 5, model) == 5
    assert events == []


@pytest.mark.parametrize("on_gpu", [True, False])
def test_models_are_loaded_in_the_trainers_turn(events: list[str], on_gpu: bool) -> None:
    found, model = turns(events, engines_sleep=True, on_gpu=on_gpu)
    found.before_loading()
    assert events == (["engines sleep", "barrier"] if on_gpu else [])
    found.start_training(model)
    assert events[:2] == ["engines sleep", "barrier"] and events.count("reload") == (0 if on_gpu else 1)
