"""The board between the workers and the driver's sinks."""

from __future__ import annotations

import asyncio

from rayrlhf.observe.board import Board, Report


def step(number: int) -> Report:
    return Report("step", number)


def phase(number: int, text: str) -> Report:
    return Report("phase", number, text)


def test_reports_are_taken_once_in_order() -> None:
    async def play() -> None:
        board = Board()
        for report in (phase(0, "rollout"), step(1)):
            await board.post(report)
        assert await board.take(1.0) == [phase(0, "rollout"), step(1)]
        assert await board.take(0.0) == []

    asyncio.run(play())


def test_a_board_that_nobody_reads_is_bounded_and_drops_phases_first() -> None:
    async def play() -> None:
        board = Board(max_reports=3)
        for report in (step(1), phase(1, "rollout"), step(2), phase(2, "rollout"), step(3), step(4)):
            await board.post(report)
        # Both phases went, then the oldest step.
        *kept, warning = await board.take(1.0)
        assert kept == [step(2), step(3), step(4)]
        assert warning.kind == "warning" and warning.text.startswith("3 reports were dropped")
        await board.post(step(5))
        assert await board.take(1.0) == [step(5)], "said once"

    asyncio.run(play())


def test_a_failure_is_reported_with_the_phase_in_which_it_happened() -> None:
    async def play() -> None:
        board = Board()
        await board.post(phase(4, "update actor"))
        await board.fail("actor worker 1 died", "the workers start again from step 4")
        [_, report] = await board.take(1.0)
        assert report == Report(
            "warning",
            4,
            "actor worker 1 died after step 4, in update actor; the workers start again from step 4",
        )

    asyncio.run(play())
