"""A reward model that is asked about texts: what its replica does between a request and the model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.reward.batching import Batcher
from rayrlhf.reward_server.requests import BadRequest
from rayrlhf.reward_server.text_model import CHUNK_CHARACTERS, CHUNK_TEXTS, TextModelReward, chunks


class Actor:
    """Tokenises by letters and scores by the first of them, one batch at a time, when it is let go."""

    def __init__(self) -> None:
        self.tokenised: list[tuple[int, int]] = []
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "tokenise":
            texts, first_index = arguments
            self.tokenised.append((len(texts), first_index))
            await asyncio.sleep(0)
            return [list(map(ord, text)) for text in texts]
        [items] = arguments
        self.batches.append([len(item.token_ids) for item in items])
        await self.free.wait()
        return [float(item.token_ids[0]) for item in items]


def replica(
    actor: Actor, *, max_request_tokens: int = 10**6, max_tokens_per_batch: int = 8
) -> TextModelReward:
    """As its constructor leaves it, without Ray."""
    source = ServedModel(type="model", path="rm", max_tokens_per_batch=max_tokens_per_batch)
    made: TextModelReward = TextModelReward.__new__(TextModelReward)
    made.model = actor  # pyright: ignore[reportAttributeAccessIssue]
    made.read_with(source, max_request_tokens)
    assert isinstance(made.batcher, Batcher)
    return made


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


def test_texts_are_tokenised_a_few_at_a_time() -> None:
    assert list(chunks([])) == []
    assert [len(chunk) for chunk in chunks(["a"] * (2 * CHUNK_TEXTS + 1))] == [CHUNK_TEXTS, CHUNK_TEXTS, 1]
    long = "a" * (CHUNK_CHARACTERS + 1)
    assert list(chunks(["a", long, "b", "c"])) == [["a"], [long], ["b", "c"]]


def test_the_exact_number_of_tokens_is_counted_until_it_is_too_many() -> None:
    """Of 3,000 tokens 513 are allowed: two chunks of 256 are within them, the third ends it."""

    async def work() -> None:
        actor = Actor()
        found = await replica(actor, max_request_tokens=513).score_texts(["a"] * 3000)
        assert isinstance(found, BadRequest) and found.status == 413
        assert found.limit == {"server.max_request_tokens": 513}
        assert actor.tokenised == [(256, 0), (256, 256), (256, 512)] and actor.batches == []

    run(work())


def test_a_batch_is_one_forward_pass_and_requests_alternate() -> None:
    """Passes of 8 tokens: two texts of four. The short request is in the second pass of four."""

    async def work() -> None:
        actor = Actor()
        made = replica(actor)
        long = asyncio.ensure_future(made.score_texts(["aaaa"] * 6))
        while not actor.batches:
            await asyncio.sleep(0.001)
        short = asyncio.ensure_future(made.score_texts(["b"]))
        await asyncio.sleep(0.01)
        actor.free.set()
        assert await short == [98.0] and await long == [97.0] * 6
        assert actor.batches == [[4, 4], [4, 1], [4, 4], [4]]

    run(work())


@pytest.mark.parametrize("phase", ["tokenising", "scoring"])
def test_work_ends_with_its_caller(phase: str) -> None:
    async def work() -> None:
        actor = Actor()
        made = replica(actor)
        asked = asyncio.ensure_future(made.score_texts(["aaaa"] * 5000))
        seen = actor.tokenised if phase == "tokenising" else actor.batches
        while not seen:
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        actor.free.set()
        assert await made.score_texts(["b"]) == [98.0]
        assert len(actor.batches) == (1 if phase == "tokenising" else 2)
        assert len(actor.tokenised) == (2 if phase == "tokenising" else 21)  # of 20 chunks, and the good one

    run(work())
