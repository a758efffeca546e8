"""Dynamic batching of single requests: samples arrive one by one, models and servers work best on batches.

`serve.batch` forms its batches before the current one has ended, each from what arrived within its short
wait: requests that trickle in meanwhile are never merged. With a custom size function it moves an item that
did not fit to the end of the queue, each time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Requests that are sent together arrive within a few milliseconds of each other.
GATHER_SECONDS = 0.005


class Batcher(Generic[Item, Result]):
    """Runs at most `max_concurrent` batches at once; items that arrive meanwhile form the next batch.

    Items of several requests alternate: a short request does not wait for all items of a long one before it.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        max_batch: int,
        max_concurrent: int = 1,
        size_of: Callable[[Item], int] = lambda _: 1,
        max_size: int | None = None,
    ) -> None:
        """`run` processes a batch: one result per item, in order. A batch has at most `max_batch` items and,
        by `size_of`, a size of at most `max_size`; a larger item forms a batch by itself.
        """
        self.run = run
        self.max_batch = max_batch
        self.max_concurrent = max_concurrent
        self.size_of = size_of
        self.max_size = max_size
        # One queue of items per request.
        self._waiting: deque[deque[tuple[Item, asyncio.Future[Result]]]] = deque()
        self._runners: set[asyncio.Task[None]] = set()

    async def ask(self, items: Sequence[Item]) -> list[Result]:
        """The results of `items`, in order. Raises what `run` raised for a batch with one of them."""
        loop = asyncio.get_running_loop()
        if not items:
            return []
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._waiting.append(deque(zip(items, futures, strict=True)))
        if len(self._runners) < self.max_concurrent:
            runner = asyncio.ensure_future(self._run_batches())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)
        return list(await asyncio.gather(*futures))

    async def _run_batches(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_SECONDS)
            if batch := self._take():
                await self._answer(batch)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """Take items of the requests alternating, one each, until the batch is full."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        room = self.max_size
        while self._waiting and len(batch) < self.max_batch:
            line = self._waiting[0]
            item, future = line[0]
            if not future.done():  # skip cancelled ones
                if room is not None:
                    room -= self.size_of(item)
                    if room < 0 and batch:
                        break
                batch.append((item, future))
            line.popleft()
            self._waiting.popleft()
            if line:
                self._waiting.append(line)
        return batch

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self.run([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except Exception as error:
            # Raised in the callers.
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
