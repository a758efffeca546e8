"""Single requests that are answered in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from rayrlhf.reward.batching import Batcher

WAIT_SECONDS = 10


class Doubler:
    """Answers 2x, as soon as it is let go, and remembers the batches and how many were under way at once."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.under_way = self.most_under_way = 0
        self.free = asyncio.Event()
        if not held:
            self.free.set()

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.free.wait()
        await asyncio.sleep(0.001)
        self.under_way -= 1
        return [2 * item for item in items]


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, WAIT_SECONDS))


def test_what_is_asked_together_goes_together_and_everybody_gets_their_own() -> None:
    async def work() -> None:
        double = Doubler()
        batcher = Batcher[int, int](double, max_batch=100)
        assert await asyncio.gather(*(batcher.ask([i]) for i in range(50))) == [[2 * i] for i in range(50)]
        assert double.batches == [list(range(50))]

    run(work())


def test_what_arrives_while_one_is_under_way_goes_next() -> None:
    async def work() -> None:
        double = Doubler(held=True)
        batcher = Batcher[int, int](double, max_batch=4)
        first = asyncio.ensure_future(batcher.ask([0]))
        while not double.batches:
            await asyncio.sleep(0)
        later = [asyncio.ensure_future(batcher.ask([i])) for i in range(1, 7)]
        await asyncio.sleep(0.05)
        assert double.batches == [[0]], "one batch at a time"
        double.free.set()
        assert await first == [0] and await asyncio.gather(*later) == [[2 * i] for i in range(1, 7)]
        assert double.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert double.most_under_way == 1

    run(work())


def test_batches_side_by_side() -> None:
    async def work() -> None:
        double = Doubler(held=True)
        batcher = Batcher[int, int](double, max_batch=1, max_concurrent=3)
        asked = [asyncio.ensure_future(batcher.ask([i])) for i in range(10)]
        await asyncio.sleep(0.1)
        assert len(double.batches) == 3
        double.free.set()
        assert await asyncio.gather(*asked) == [[2 * i] for i in range(10)]
        assert double.most_under_way == 3

    run(work())


def test_a_long_request_is_cut_and_put_together_again() -> None:
    async def work() -> None:
        double = Doubler()
        batcher = Batcher[int, int](double, max_batch=3, max_concurrent=2)
        assert await batcher.ask(range(8)) == [2 * i for i in range(8)]
        assert sorted(map(len, double.batches)) == [2, 3, 3]
        assert await batcher.ask([]) == []

    run(work())


def test_an_error_is_for_those_in_its_batch_only() -> None:
    async def sometimes(items: list[int]) -> Sequence[int]:
        if 1 in items:
            raise ValueError("no one")
        return items

    async def work() -> None:
        batcher = Batcher[int, int](sometimes, max_batch=2)
        answers = await asyncio.gather(*(batcher.ask([i]) for i in range(4)), return_exceptions=True)
        assert [str(answer) for answer in answers[:2]] == ["no one", "no one"]
        assert answers[2:] == [[2], [3]]
        assert await batcher.ask([7]) == [7], "it goes on afterwards"

    run(work())


def test_a_wrong_number_of_results_is_an_error() -> None:
    async def too_few(items: list[int]) -> Sequence[int]:
        return items[1:]

    with pytest.raises(RuntimeError, match="1 results for a batch of 2"):
        run(Batcher[int, int](too_few, max_batch=8).ask([1, 2]))


def test_nobody_waits_for_what_was_cancelled() -> None:
    async def work() -> None:
        double = Doubler(held=True)
        batcher = Batcher[int, int](double, max_batch=8)
        first = asyncio.ensure_future(batcher.ask([0]))
        while not double.batches:
            await asyncio.sleep(0)
        gone, stays = asyncio.ensure_future(batcher.ask([1])), asyncio.ensure_future(batcher.ask([2]))
        await asyncio.sleep(0)
        gone.cancel()
        double.free.set()
        assert await first == [0] and await stays == [4]
        assert double.batches == [[0], [2]]

    run(work())


def test_a_short_request_does_not_wait_for_all_of_a_long_one() -> None:
    """Twelve items wait when one comes: it is in the next batch of four, and not in the fourth."""

    async def work() -> None:
        double = Doubler(held=True)
        batcher = Batcher[int, int](double, max_batch=4)
        long = asyncio.ensure_future(batcher.ask(range(16)))
        while not double.batches:
            await asyncio.sleep(0)
        short = asyncio.ensure_future(batcher.ask([100]))
        await asyncio.sleep(0)
        double.free.set()
        assert await short == [200]
        assert double.batches[:2] == [[0, 1, 2, 3], [4, 100, 5, 6]]
        assert await long == [2 * i for i in range(16)]

    run(work())


def test_a_batch_has_a_size_and_a_larger_item_goes_alone() -> None:
    """Sizes 3, 3, 9, 1, 2 with room for 6 at most: 3 + 3, then 9 by itself, then 1 + 2."""

    async def work() -> None:
        double = Doubler()
        batcher = Batcher[int, int](double, max_batch=8, size_of=lambda item: item, max_size=6)
        assert await batcher.ask([3, 3, 9, 1, 2]) == [6, 6, 18, 2, 4]
        assert double.batches == [[3, 3], [9], [1, 2]]

    run(work())


def test_of_a_request_that_was_cancelled_nothing_is_in_the_next_batch() -> None:
    async def work() -> None:
        double = Doubler(held=True)
        batcher = Batcher[int, int](double, max_batch=2)
        gone = asyncio.ensure_future(batcher.ask(range(1000)))
        while not double.batches:
            await asyncio.sleep(0)
        stays = asyncio.ensure_future(batcher.ask([7]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        double.free.set()
        assert await stays == [14]
        assert double.batches == [[0, 1], [7]]

    run(work())
