"""Every report reaches the driver once, whatever happens to the board's process."""

from __future__ import annotations

import asyncio

from rayrlhf.observe.board import Board, Poster, Receipt, Report, Taker


def reports(count: int) -> list[Report]:
    return [Report("step", step) for step in range(count)]


def test_what_is_posted_is_taken_in_order_and_once() -> None:
    async def body() -> None:
        board, poster, taker = Board(), Poster(), Taker()
        one, two, three = reports(3)
        for report in (one, two):
            await board.post(poster.number(report))
        assert taker.new(*await board.take(5, taker.last_taken)) == [one, two]
        await board.post(poster.number(three))
        assert taker.new(*await board.take(5, taker.last_taken)) == [three]
        assert taker.new(*await board.take(0.01, taker.last_taken)) == []

    asyncio.run(body())


def test_28_no_report_is_lost_with_the_boards_process() -> None:
    """Nor comes twice. Before, what waited there was gone, and the thread that took it with it."""

    async def body() -> None:
        first, poster, taker = Board(), Poster(), Taker()
        one, two, three, four = reports(4)
        receipts = [await first.post(poster.number(one)), await first.post(poster.number(two))]
        assert poster.handle_receipts(receipts) == []
        assert taker.new(*await first.take(5, taker.last_taken)) == [one, two]
        receipts = [await first.post(poster.number(three))]  # acknowledged, and lost

        second = Board()
        receipts.append(await second.post(poster.number(four)))
        again = poster.handle_receipts(receipts)
        assert [posted.number for posted in again] == [1, 2, 3, 4] and poster.num_deaths == 1
        receipts = [await second.post(posted) for posted in again]
        found = taker.new(*await second.take(5, taker.last_taken))
        assert sorted(report.step for report in found) == [2, 3]
        assert taker.new(*await second.take(0.01, taker.last_taken)) == []
        receipts.append(await second.post(poster.number(one)))
        assert poster.handle_receipts(receipts) == []
        assert list(poster.unconfirmed) == [5], "the driver has confirmed the others"

    asyncio.run(body())


def test_an_answer_that_did_not_arrive_is_given_again() -> None:
    async def body() -> None:
        board, poster, taker = Board(), Poster(), Taker()
        [one] = reports(1)
        await board.post(poster.number(one))
        await board.take(5, taker.last_taken)  # lost on its way
        assert taker.new(*await board.take(5, taker.last_taken)) == [one]

    asyncio.run(body())


def test_without_a_receipt_everything_unconfirmed_is_posted_again() -> None:
    poster = Poster()
    numbered = [poster.number(report) for report in reports(2)]
    assert poster.handle_receipts([Receipt("a", 1), None]) == numbered[1:]
    assert poster.handle_receipts([Receipt("a", 2)]) == []


def test_a_board_that_is_not_read_is_bounded_and_drops_phases_first() -> None:
    async def body() -> None:
        board, poster, taker = Board(max_reports=3), Poster(), Taker(gap_seconds=0.0)

        async def post(report: Report) -> None:
            await board.post(poster.number(report))

        one, two, three, four = (Report("step", step) for step in range(1, 5))
        for report in (one, Report("phase", 1, "rollout"), two, Report("phase", 2, "rollout"), three, four):
            await post(report)
        # Both phases went, then the oldest step.
        *kept, warning = taker.new(*await board.take(5, taker.last_taken))
        assert kept == [two, three, four]
        assert warning.kind == "warning" and warning.text.startswith("3 reports were dropped")
        await post(one)
        assert taker.new(*await board.take(5, taker.last_taken)) == [one], "said once"

    asyncio.run(body())


def test_what_the_driver_was_given_is_not_dropped_before_it_says_so() -> None:
    async def body() -> None:
        board, poster, taker = Board(max_reports=2), Poster(), Taker(gap_seconds=0.0)
        first, second, third, fourth, fifth = (Report("step", step) for step in range(1, 6))
        for report in (first, second):
            await board.post(poster.number(report))
        name, given = await board.take(5, taker.last_taken)
        for report in (third, fourth, fifth):
            await board.post(poster.number(report))
        assert taker.new(name, given) == [first, second]
        *kept, warning = taker.new(*await board.take(5, taker.last_taken))
        assert kept == [fourth, fifth] and warning.text.startswith("1 reports were dropped")

    asyncio.run(body())


def test_28_reports_that_are_posted_again_come_before_later_ones() -> None:
    """A row of step 5 before that of step 4 would be taken for a run that began again."""
    poster, taker = Poster(), Taker()
    four, five = (poster.number(Report("step", step)) for step in (4, 5))
    assert taker.new("second", [five]) == []
    assert taker.new("second", [five, four, five]) == [four.report, five.report]
    assert taker.new("second", [four, five]) == []


def test_the_wait_for_a_missing_report_is_bounded() -> None:
    poster, taker = Poster(), Taker(gap_seconds=0.0)
    poster.number(Report("step", 1))
    second = poster.number(Report("step", 2))
    assert taker.new("board", [second]) == [second.report]
    patient = Taker()
    assert patient.new("board", [second]) == []
    assert patient.new("board", [], last_call=True) == [second.report]
