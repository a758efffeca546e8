"""Reward model deployment of the reward server: scores texts, which it encodes with its own tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.placement.slots import Slots
from rayrlhf.reward.batching import Batcher
from rayrlhf.reward.items import Failure, ScoreItem
from rayrlhf.reward.model_deployment import MAX_BATCH, ModelReward, ScoreActor, replica_deployment
from rayrlhf.reward_server.requests import BadRequest, ModelFacts, TextTokens, token_item, too_many_tokens

# Limits of one tokenisation call of the actor, about 0.2 s: between calls, other requests are served and a
# request whose client has disconnected is dropped.
CHUNK_CHARACTERS = 200_000
CHUNK_TEXTS = 256


class TextScoreActor(ScoreActor):
    """One reward model with its tokenizer."""

    def read_texts(self, source: ServedModel, facts: ModelFacts) -> None:
        """Load the tokenizer; must be called first."""
        from rayrlhf.models.load import load_tokenizer  # imports transformers

        self.tokens = TextTokens(source, load_tokenizer(source.path), facts)

    def tokenise(self, texts: list[str], first_index: int) -> list[list[int]] | BadRequest:
        try:
            return self.tokens.of(texts, first_index)
        except BadRequest as error:
            return error  # a regular result: the call itself has not failed


class TextModelReward(ModelReward):
    """Serve replica in front of the actor."""

    ACTOR = TextScoreActor

    async def __init__(
        self, source: ServedModel, facts: ModelFacts, role: str, max_request_tokens: int, slots: Slots
    ) -> None:
        await super().__init__(role, source, None, slots)
        await self.model.call("read_texts", source, facts, timeout_seconds=600)
        self.read_with(source, max_request_tokens)

    def read_with(self, source: ServedModel, max_request_tokens: int) -> None:
        self.max_request_tokens = max_request_tokens
        self.tokenising = asyncio.Lock()  # fair: chunks of concurrent requests alternate
        # A batch is one forward pass: cancelled items are not in the next one.
        self.batcher = Batcher[ScoreItem, float | Failure](
            self._score_batch,
            max_batch=MAX_BATCH,
            size_of=lambda item: len(item.token_ids),
            max_size=source.max_tokens_per_batch,
        )

    async def score_texts(self, texts: list[str]) -> list[float | Failure] | BadRequest:
        rows: list[ScoreItem] = []
        num_tokens = 0
        for chunk in chunks(texts):
            async with self.tokenising:
                found = await self.model.call("tokenise", chunk, len(rows))
            if isinstance(found, BadRequest):
                return found
            num_tokens += sum(map(len, found))
            if num_tokens > self.max_request_tokens:
                return too_many_tokens(f"more than {self.max_request_tokens} tokens", self.max_request_tokens)
            rows += map(token_item, found)
        return await self.batcher.ask(rows)


def chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Split texts into chunks, in order; a long text is alone in its chunk."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and (size + len(text) > CHUNK_CHARACTERS or len(chunk) == CHUNK_TEXTS):
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk


def text_model_deployment(
    source: ServedModel, facts: ModelFacts, *, role: str, max_request_tokens: int, slots: Slots
) -> Any:
    return replica_deployment(TextModelReward, source, (source, facts, role, max_request_tokens, slots))
