"""The timer by a clock that the test sets, and the list of metrics that the docs are made from."""

from __future__ import annotations

import re

import pytest

from rayrlhf.observe import metric_keys as metrics_module
from rayrlhf.observe.metric_keys import METRICS, Timer, check_keys


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def test_a_phase_adds_up(clock: Clock) -> None:
    timer = Timer()
    for seconds in (2.0, 3.0):
        with timer("rollout"):
            clock.now += seconds
        clock.now += 50.0  # between phases
    assert timer.drain() == {"time/rollout": 5.0}
    assert timer.drain() == {}


def test_phases_nest(clock: Clock) -> None:
    timer = Timer()
    with timer("step"):
        clock.now += 1.0
        with timer("update_actor"):
            clock.now += 4.0
    assert timer.drain() == {"time/update_actor": 4.0, "time/step": 5.0}


def test_a_phase_that_fails_has_taken_its_time(clock: Clock) -> None:
    timer = Timer()
    with pytest.raises(ValueError), timer("eval"):
        clock.now += 2.0
        raise ValueError
    assert timer.drain() == {"time/eval": 2.0}


def test_keys_are_group_and_name_and_described() -> None:
    for key, description in METRICS.items():
        assert re.fullmatch(r"(reward|rollout|kl|loss|experts|data|train|eval|time)/[a-z0-9_]+", key), key
        assert description.strip() == description != "", key


def test_keys_that_the_docs_would_miss_are_an_error() -> None:
    check_keys({})
    check_keys(dict.fromkeys(METRICS, 0.0))
    with pytest.raises(KeyError, match=r"METRICS: \['loss/acter', 'reward'\]"):
        check_keys({"reward": 1.0, "loss/actor": 1.0, "loss/acter": 1.0})
