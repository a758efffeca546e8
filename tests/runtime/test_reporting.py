"""What processes of a run post is what a board takes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.observe.board import Board, Report, Taker
from rayrlhf.runtime import reporting
from rayrlhf.runtime.reporting import ToBoard


def test_lines_for_the_console_reach_the_driver_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Any] = []
    actor = SimpleNamespace(post=SimpleNamespace(remote=posted.append))
    monkeypatch.setattr(reporting.ray, "get_actor", lambda *_, **__: actor)
    first, second = ToBoard("board"), ToBoard("board")
    first("a")
    second("b")
    first("c")

    async def taken() -> list[Report]:
        board, taker = Board(), Taker()
        for each in posted:
            await board.post(each)
        return taker.new(*await board.take(5, taker.last_taken))

    assert asyncio.run(taken()) == [Report("note", 0, text) for text in "abc"]
