"""The pool of rollouts in flight: order, age, carry-over, restarts; rollouts finish on command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from rayrlhf.policy.prompt_queue import Numbered, PromptQueue
from rayrlhf.policy.rollout_pool import RolloutPool
from rayrlhf.rollout.background import Background
from rayrlhf.samples import Sample
from tests.samples import make_prompt, make_sample

PER_STEP = 2


class Engines:
    """Finishes the groups in `finished`; others wait. A sample's score is the version it was started at."""

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
    queue = PromptQueue(rank=0, per_rank=PER_STEP, prompts_per_batch=PER_STEP)
    batches: Iterator = (
        (b, [make_prompt(row_id=b * PER_STEP + i) for i in range(PER_STEP)]) for b in range(50)
    )
    queue.connect(batches)
    return queue


def pool_of(
    engines: Engines,
    max_staleness: int,
    oversampling: float = 1.0,
    timeout: float = 10.0,
    total_steps: int = 20,
    on_group: Callable[[int], None] = lambda done: None,
) -> RolloutPool:
    return RolloutPool(
        prompts(),
        engines.collect_group,
        Background(),
        per_step=PER_STEP,
        max_staleness=max_staleness,
        oversampling=oversampling,
        total_steps=total_steps,
        timeout_seconds=timeout,
        on_group=on_group,
    )


def taken(pool: RolloutPool, step: int) -> list[tuple[int, int]]:
    """(group id, version it was started at) of the step's groups."""
    return [(s.group_id, int(s.score or 0)) for s in pool.next(step)]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_groups_come_in_order_and_never_too_old(max_staleness: int) -> None:
    engines = Engines()
    engines.everything = True
    pool = pool_of(engines, max_staleness, total_steps=8)
    for step in range(8):
        groups = taken(pool, step)
        assert [group_id for group_id, _ in groups] == [2 * step, 2 * step + 1]
        assert all(started == max(0, step - max_staleness) for _, started in groups)
        assert len(pool.in_flight) == PER_STEP * min(max_staleness, 7 - step), "none that is not needed"
    assert pool.drain_restarted() == 0


def test_in_order_a_fast_group_waits_for_a_slow_one() -> None:
    engines = Engines()
    engines.finished = {1, 2, 3}
    pool = pool_of(engines, 1, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"no group finished within rollout.timeout_seconds=0.05; .*\[0\]"):
        pool.next(0)
    engines.finished.add(0)
    assert [group_id for group_id, _ in taken(pool, 0)] == [0, 1]


def test_oversampling_takes_the_first_to_finish_and_carries_the_others_over() -> None:
    engines = Engines()
    pool = pool_of(engines, max_staleness=1, oversampling=1.5)  # 2 · (1 + 1.5) = 5 in flight
    engines.finished = {2, 4}
    assert taken(pool, 0) == [(2, 0), (4, 0)]
    engines.finished = {0, 5}
    assert taken(pool, 1) == [(0, 0), (5, 1)], "an old one that went on, and a new one"
    assert pool.restarted == 0
    # At version 2 the groups of version 0 (1 and 3) are too old: they start again, before new prompts.
    engines.everything = True
    pool.next(2)
    assert pool.drain_restarted() == 2
    assert [group for group in engines.started if group[0] in (1, 3)] == [(1, 0), (3, 0), (1, 2), (3, 2)]
    deadline = time.monotonic() + 10  # each is cancelled in the pool's own thread
    while len(engines.cancelled) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(engines.cancelled) == [1, 3]


def test_closing_ends_what_is_in_flight() -> None:
    engines = Engines()
    engines.finished = {0, 1}
    pool = pool_of(engines, 2)
    pool.next(0)
    pool.close()
    pool.background.run(asyncio.sleep(0.01))
    assert sorted(engines.cancelled) == [2, 3, 4, 5]


def test_what_a_checkpoint_must_remember_is_what_is_in_flight() -> None:
    engines = Engines()
    engines.finished = {0, 1}
    pool = pool_of(engines, 1)
    pool.next(0)
    assert sorted(pool.prompts._unfinished) == [2, 3]
    pool.close()
