"""The pool of rollouts in flight: order, age, carry-over, restarts; rollouts finish on command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.rollout_pool import RolloutsAhead
from rayrlhf.policy.rollouts import Numbered
from rayrlhf.rollout.background import Background
from rayrlhf.samples import Sample
from tests.samples import make_prompt, make_sample

PER_STEP = 2


class Engines:
    """Finishes the groups it is told to; others wait. A sample's score is the version it was started at."""

    def __init__(self) -> None:
        self.finished: set[int] = set()
        self.everything = False
        self.started: list[tuple[int, int]] = []  # (group id, version)
        self.cancelled: list[int] = []

    async def collect_group(self, numbered: Numbered, version: int) -> list[Sample]:
        group_id, prompt = numbered
        self.started.append((group_id, version))
        try:
            while not self.everything and group_id not in self.finished:
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(group_id)
            raise
        return [make_sample(group_id=group_id, prompt=prompt, score=float(version))]


def prompts() -> PromptQueue:
    queue = PromptQueue(rank=0, per_rank=PER_STEP, prompts_per_draw=PER_STEP)
    draws: Iterator = (
        (d, [make_prompt(row_id=d * PER_STEP + i) for i in range(PER_STEP)]) for d in range(50)
    )
    queue.connect(draws)
    return queue


def pool(
    engines: Engines, max_staleness: int, oversampling: float = 1.0, timeout: float = 10.0
) -> RolloutsAhead:
    return RolloutsAhead(
        prompts(),
        engines.collect_group,
        Background(),
        per_step=PER_STEP,
        max_staleness=max_staleness,
        oversampling=oversampling,
        timeout_seconds=timeout,
    )


def drawn(ahead: RolloutsAhead, version: int, remaining: int = 10) -> list[tuple[int, int]]:
    """(group id, version it was started at) of the groups taken."""
    return [(s.group_id, int(s.score or 0)) for s in ahead.draw(version, remaining)]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_groups_come_in_order_and_never_too_old(max_staleness: int) -> None:
    engines = Engines()
    engines.everything = True
    ahead = pool(engines, max_staleness)
    for version in range(8):
        taken = drawn(ahead, version, remaining=8 - version)
        assert [group_id for group_id, _ in taken] == [2 * version, 2 * version + 1]
        assert all(started == max(0, version - max_staleness) for _, started in taken)
        assert len(ahead.in_flight) == PER_STEP * min(max_staleness, 7 - version), "none that nobody needs"
    assert ahead.drain_restarted() == 0


def test_in_order_a_fast_group_waits_for_a_slow_one() -> None:
    engines = Engines()
    engines.finished = {1, 2, 3}
    ahead = pool(engines, 1, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"no group finished within rollout.timeout_seconds=0.05; .*\[0\]"):
        ahead.draw(0, 10)
    engines.finished.add(0)
    assert [group_id for group_id, _ in drawn(ahead, 0)] == [0, 1]


def test_oversampling_takes_the_first_to_finish_and_carries_the_others_over() -> None:
    engines = Engines()
    ahead = pool(engines, max_staleness=1, oversampling=1.5)  # 2 · (1 + 1.5) = 5 in flight
    engines.finished = {2, 4}
    assert drawn(ahead, 0) == [(2, 0), (4, 0)]
    engines.finished = {0, 5}
    assert drawn(ahead, 1) == [(0, 0), (5, 1)], "an old one that went on, and a new one"
    assert ahead.restarted == 0
    # At version 2 the groups of version 0 (1 and 3) are too old: they start anew, before new prompts.
    engines.everything = True
    ahead.draw(2, 10)
    assert ahead.drain_restarted() == 2
    assert [group for group in engines.started if group[0] in (1, 3)] == [(1, 0), (3, 0), (1, 2), (3, 2)]
    deadline = time.monotonic() + 10  # each learns of it in the pool's own thread
    while len(engines.cancelled) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(engines.cancelled) == [1, 3]


def test_closing_ends_what_is_in_flight() -> None:
    engines = Engines()
    engines.finished = {0, 1}
    ahead = pool(engines, 2)
    ahead.draw(0, 10)
    ahead.close()
    ahead.background.run(asyncio.sleep(0.01))
    assert sorted(engines.cancelled) == [2, 3, 4, 5]


def test_what_a_checkpoint_must_remember_is_what_is_in_flight() -> None:
    engines = Engines()
    engines.finished = {0, 1}
    ahead = pool(engines, 1)
    ahead.draw(0, 10)
    assert sorted(ahead.prompts._unfinished) == [2, 3]
    ahead.close()
