"""What our reward server is asked: the body of a request, and the tokens of a text."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.data.rows import BadRow, check_unicode
from rayrlhf.reward.items import ScoreItem
from rayrlhf.samples import Prompt

LABEL = "label"  # the column of `Prompt.columns` that holds a query's label
WANTED = '{"query": [texts], "prompts": [texts], "labels": [values]}'


class BadRequest(ValueError):
    """A request that cannot be answered, with the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Queries:
    """The lists of one request, all of one length."""

    query: list[str]  # prompt and response as one text
    prompts: list[str] | None
    labels: list[Any]

    @cached_property
    def items(self) -> list[ScoreItem]:
        """What functions are asked. Raises `BadRequest` where prompt and response cannot be told apart."""
        if self.prompts is None:
            raise BadRequest(
                "no 'prompts'; wanted a text per query, since this server has a reward function, "
                "which is given prompt and response"
            )
        items = []
        for index, (query, prompt) in enumerate(zip(self.query, self.prompts, strict=True)):
            if not query.startswith(prompt):
                raise BadRequest(
                    f"query {index} does not begin with prompts[{index}]; wanted prompt + response"
                )
            items.append(text_item(prompt, query[len(prompt) :], label=self.labels[index]))
        return items


def text_item(prompt: str, response: str, *, label: Any) -> ScoreItem:
    """A sample whose tokens nobody needs."""
    asked = Prompt(row_id=0, prompt_ids=[], prompt=prompt, columns={LABEL: label})
    return ScoreItem(asked, response, token_ids=[])


def token_item(token_ids: list[int]) -> ScoreItem:
    """A sample of which a model reads the tokens and nothing else."""
    return ScoreItem(Prompt(row_id=0, prompt_ids=[], prompt=""), "", token_ids)


def read_queries(body: bytes) -> Queries:
    """The request's lists; keys that are not ours are ignored. Raises `BadRequest` with what is wrong."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error}); wanted {WANTED}") from error
    if not isinstance(asked, dict):
        raise BadRequest(f"the body is a {type(asked).__name__}; wanted {WANTED}")
    query = _texts(asked, "query")
    if query is None:
        raise BadRequest(f"no 'query'; wanted {WANTED}")
    prompts = _texts(asked, "prompts")
    labels = asked.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise BadRequest(f"'labels' is a {type(labels).__name__}; wanted a list with a value per query")
    for name, values in (("prompts", prompts), ("labels", labels)):
        if values is not None and len(values) != len(query):
            raise BadRequest(f"'{name}' has {len(values)} items and 'query' {len(query)}; wanted as many")
    return Queries(query, prompts, labels if labels is not None else [None] * len(query))


def _texts(asked: Mapping[str, Any], name: str) -> list[str] | None:
    values = asked.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise BadRequest(f"'{name}' is a {type(values).__name__}; wanted a list of texts")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise BadRequest(f"{name}[{index}] is a {type(value).__name__}; wanted a text")
        try:
            check_unicode(value, f"{name}[{index}]")
        except BadRow as error:
            raise BadRequest(str(error)) from error
    return values


@dataclass(frozen=True)
class ModelFacts:
    """What the server has to know of a checkpoint."""

    max_tokens: int | None  # of the longest query; None where the model sets no limit
    is_decoder: bool  # it reads packed sequences, judged at their last token
    mean: float = 0.0  # subtracted from its scores, which then are divided by `std`
    std: float = 1.0


class TextTokens:
    """The tokens of a served model's queries.

    A query is what a policy has read and written, special tokens included: these are taken as such, and a
    beginning-of-sequence token is added only where the tokenizer adds one and the text has none. The score is
    read at the last token. That is the end-of-sequence token only if the text ends with it or the source has
    `append_eos`; a text that a chat template closed by eos and a line break ends with the line break.
    """

    def __init__(self, source: ServedModel, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.facts = facts
        self.lock = threading.Lock()  # a tokenizer holds the settings of the call under way
        tokenizer.truncation_side = "left" if source.on_long == "keep_end" else "right"
        bos = tokenizer.bos_token_id
        self.first: list[Any] = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []

    def of(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises `BadRequest` for a text that is too long (413) or has no token (400)."""
        encode = self._decoder_ids if self.facts.is_decoder else self._encoder_ids
        with self.lock:
            rows = [encode(text) for text in texts]
        limit = self.facts.max_tokens
        for index, ids in enumerate(rows):
            if not ids:
                raise BadRequest(f"query {index} has no token; wanted a text that is not empty")
            if limit is not None and len(ids) > limit:
                raise BadRequest(
                    f"query {index} has {len(ids)} tokens; {self.source.path} reads {limit} at most "
                    "(the server's max_tokens; its on_long=keep_end or keep_start would cut longer ones)",
                    status=413,
                )
        return rows

    def _decoder_ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded.input_ids
        if ids[:1] != self.first:
            ids = [*self.first, *ids]
        eos: Any = self.tokenizer.eos_token_id
        end = [eos] if self.source.append_eos and ids[-1:] != [eos] else []
        if self.facts.max_tokens is not None and self.source.on_long != "reject":
            room = self.facts.max_tokens - len(end)
            ids = ids[:room] if self.source.on_long == "keep_start" else ids[max(0, len(ids) - room) :]
        return [*ids, *end]

    def _encoder_ids(self, text: str) -> list[int]:
        """The tokenizer frames the text with tokens of its own, which must survive a cut."""
        cut = self.facts.max_tokens is not None and self.source.on_long != "reject"
        encoded: Any = self.tokenizer(
            text, truncation=cut, max_length=self.facts.max_tokens if cut else None, verbose=False
        )
        return encoded.input_ids
