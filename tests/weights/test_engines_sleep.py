"""Trainers wait until every engine has given its memory back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from rayrlhf.placement.memory_turns import TurnsNotKnown
from rayrlhf.weights import sync
from rayrlhf.weights.sync import WeightSync


class Store:
    """Stands for the weight store's client: what it answers, call by call."""

    def __init__(self, *answers: dict[str, str] | Exception) -> None:
        self.answers = list(answers)
        self.engines_own_memory = True

    def set_engines_own_memory(self, engines_own_memory: bool) -> None:
        self.engines_own_memory = engines_own_memory

    def call(self, method: str) -> dict[str, str]:
        assert method == "engines_up" and not self.engines_own_memory
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "POLL_SECONDS", 0.01)


def put_to_sleep(store: Store, freed: list[list[int]], *, seconds: float = 5.0) -> int:
    """`freed`: by the engines that Serve knows, call by call."""
    nothing: Any = None
    weights = WeightSync(
        nothing,
        nothing,
        route="object_store",
        rank=1,
        device=torch.device("cpu"),
        num_engines=2,
        bucket_bytes=1,
        timeout_seconds=5,
        start_timeout_seconds=seconds,
        gathered=lambda _: nullcontext(),
        gather=lambda items: items,
    )
    weights.weight_store = store  # pyright: ignore[reportAttributeAccessIssue]

    def call_engines(what: str, method: str) -> list[dict[str, Any]]:
        return [{"freed_bytes": each} for each in (freed.pop(0) if freed else [])]

    weights._call_engines = call_engines  # pyright: ignore[reportAttributeAccessIssue]
    return weights.engines_sleep()


def test_engines_that_start_are_waited_for_and_asked_again() -> None:
    """At the beginning of a run Serve knows no engine yet."""
    starting = {"rollout 0": "starting", "rollout 1": "starting"}
    store = Store(starting, starting, {"rollout 1": "awake"}, {})
    assert put_to_sleep(store, [[], [], [7], [0, 5]]) == 12


def test_what_a_restarted_store_does_not_know_is_not_taken_for_nothing() -> None:
    store = Store(TurnsNotKnown(), TurnsNotKnown(), {})
    assert put_to_sleep(store, [[3], [0], [0]]) == 3
    assert store.answers == [{}]


def test_an_engine_that_never_gives_its_memory_back_is_named() -> None:
    message = (
        r"after rollout.start_timeout_seconds=0.1 these engines still hold theirs: {'rollout 1': 'starting'}"
    )
    with pytest.raises(TimeoutError, match=message):
        put_to_sleep(Store({"rollout 1": "starting"}), [], seconds=0.1)
