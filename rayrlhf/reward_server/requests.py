"""Requests of the reward server: parsing of the body, tokenization of the texts."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.data.rows.row import BadRow, check_unicode
from rayrlhf.reward.items import ScoreItem
from rayrlhf.reward.reading import ReadAt, Reading
from rayrlhf.samples import Prompt

if TYPE_CHECKING:  # the replicas that read requests do not import transformers
    from transformers import PreTrainedTokenizerBase

LABEL = "label"  # the column of `Prompt.columns` that holds a query's label
SHOWN_CHARACTERS = 40  # of a client's text in an error message
WANTED = '{"query": [texts], "prompts": [texts], "labels": [values]}'


# Tokenised beyond `max_tokens` of a text that will be cut: tokens at a cut differ from the full text's.
CUT_MARGIN_TOKENS = 64


class BadRequest(ValueError):
    """An invalid request, with the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400, limit: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.limit = dict(limit or {})  # config key and value of the exceeded limit


@dataclass(frozen=True)
class Queries:
    """The lists of one request, all of the same length."""

    query: list[str]  # prompt and response as one text
    prompts: list[str] | None
    labels: list[Any]

    @cached_property
    def items(self) -> list[ScoreItem]:
        """The items for reward functions. Raises `BadRequest` if prompt and response cannot be separated."""
        if self.prompts is None:
            raise BadRequest(
                "no 'prompts'; wanted a text per query, since this server has a reward function, "
                "which takes prompt and response"
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
    """A sample without tokens, for reward functions."""
    row = Prompt(row_id=0, prompt_ids=[], prompt=prompt, columns={LABEL: label})
    return ScoreItem(row, response, token_ids=[])


def token_item(token_ids: list[int]) -> ScoreItem:
    """A sample with tokens only, for reward models."""
    return ScoreItem(Prompt(row_id=0, prompt_ids=[], prompt=""), "", token_ids)


def read_queries(body: bytes, *, max_queries: int | None = None) -> Queries:
    """The request's lists; unknown keys are ignored. Raises `BadRequest`.

    Stricter than `json.loads`: no NaN, no number beyond the range of a float, no duplicate keys, UTF-8 only.
    """
    try:
        content = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error}); wanted {WANTED}") from error
    if not isinstance(content, dict):
        raise BadRequest(f"the body is a {type(content).__name__}; wanted {WANTED}")
    query = _texts(content, "query", max_queries)
    if query is None:
        raise BadRequest(f"no 'query'; wanted {WANTED}")
    prompts = _texts(content, "prompts", max_queries)
    labels = content.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise BadRequest(f"'labels' is a {type(labels).__name__}; wanted a list with a value per query")
    for name, values in (("prompts", prompts), ("labels", labels)):
        if values is not None and len(values) != len(query):
            raise BadRequest(f"'{name}' has {len(values)} items and 'query' {len(query)}; wanted as many")
    return Queries(query, prompts, labels if labels is not None else [None] * len(query))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {_shown(twice)} in an object")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {_shown(text)} is too large")
    return value


def _shown(text: str) -> str:
    return ascii(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def _texts(queries: Mapping[str, Any], name: str, max_queries: int | None) -> list[str] | None:
    values = queries.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise BadRequest(f"'{name}' is a {type(values).__name__}; wanted a list of texts")
    if max_queries is not None and len(values) > max_queries:
        raise BadRequest(
            f"'{name}' has {len(values)} items; this server accepts at most {max_queries} per request",
            status=413,
            limit={"server.max_queries": max_queries},
        )
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
    """Properties of a checkpoint that the server needs."""

    max_tokens: int | None  # longest query; None if the model sets no limit
    is_decoder: bool  # reads packed sequences, scored at their last token
    mean: float = 0.0  # subtracted from its scores, which are then divided by `std`
    std: float = 1.0
    characters_per_token: int = 64  # of the longest token in its vocabulary
    read_at: ReadAt = "template_end"  # the token at which it was trained and is scored
    input_template: str | None = None  # if it was trained without chat template


def cut_to_readable(
    texts: Sequence[str], source: ServedModel, facts: ModelFacts, max_request_tokens: int
) -> list[str]:
    """Cut texts to what can be read at all, before tokenisation.

    No token has more characters than the longest of the vocabulary, so a text's length gives a lower bound
    of its number of tokens (white space that a tokenizer drops, and unknown words that become one token, are
    counted by their characters). Raises `BadRequest` (413) for a text, or texts together, too long by this
    bound.
    """
    longest = facts.characters_per_token
    if facts.max_tokens is not None:
        if source.on_long == "reject":
            most = facts.max_tokens * longest
            for index, text in enumerate(texts):
                if len(text) > most:
                    least = -(-len(text) // longest)
                    raise _too_long(
                        f"query {index} has {len(text)} characters, {least} tokens or more", source, facts
                    )
        else:
            room = (facts.max_tokens + CUT_MARGIN_TOKENS) * longest
            texts = [text[:room] if source.on_long == "keep_start" else text[-room:] for text in texts]
    total = sum(map(len, texts))
    if total > max_request_tokens * longest:
        raise too_many_tokens(f"{-(-total // longest)} tokens or more", max_request_tokens)
    return list(texts)


def too_many_tokens(found: str, max_request_tokens: int) -> BadRequest:
    return BadRequest(
        f"the queries have {found} in all; this server accepts at most {max_request_tokens} per request: "
        "send fewer queries per request",
        status=413,
        limit={"server.max_request_tokens": max_request_tokens},
    )


def _too_long(found: str, source: ServedModel, facts: ModelFacts) -> BadRequest:
    assert facts.max_tokens is not None
    return BadRequest(
        f"{found}; {source.path} reads at most {facts.max_tokens} "
        "(the server's max_tokens; its on_long=keep_end or keep_start would cut longer ones)",
        status=413,
        limit={"max_tokens": facts.max_tokens},
    )


class TextTokens:
    """Tokenises the queries of a served model.

    A query is the text of a policy's prompt and response, special tokens included: these are encoded as such,
    and a beginning-of-sequence token is added only if the tokenizer adds one and the text has none. The score
    is read at the last token. For a model whose config says so, or with `read_at: answer_end`, that is the
    token that ends the answer. For others it is the end-of-sequence token only if the text ends with it or
    the source has `append_eos`; a text that a chat template closed by eos and a line break ends with the line
    break.
    """

    def __init__(self, source: ServedModel, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.facts = facts
        self.lock = threading.Lock()  # a tokenizer stores the settings of the current call
        tokenizer.truncation_side = "left" if source.on_long == "keep_end" else "right"
        bos = tokenizer.bos_token_id
        self.reading = Reading(tokenizer, facts.read_at, input_template=facts.input_template)
        self.first: list[Any] = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []

    def of(self, texts: Sequence[str], first_index: int = 0) -> list[list[int]]:
        """Raises `BadRequest` for a text that is too long (413) or has no token (400). `first_index` is the
        index of the first text in its request.
        """
        encode = self._decoder_ids if self.facts.is_decoder else self._encoder_ids
        with self.lock:
            rows = [encode(text) for text in texts]
        limit = self.facts.max_tokens
        for index, ids in enumerate(rows, start=first_index):
            if not ids:
                raise BadRequest(f"query {index} has no token; wanted a non-empty text")
            if limit is not None and len(ids) > limit:
                raise _too_long(f"query {index} has {len(ids)} tokens", self.source, self.facts)
        return rows

    def _decoder_ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded.input_ids
        if ids[:1] != self.first:
            ids = [*self.first, *ids]
        eos: Any = self.tokenizer.eos_token_id
        end = [eos] if self.source.append_eos and ids[-1:] != [eos] else []
        if self.reading.at == "answer_end":
            ids = self.reading.of_text_ids(ids)
            ids, end = ids[:-1], ids[-1:]
        if self.facts.max_tokens is not None and self.source.on_long != "reject":
            room = self.facts.max_tokens - len(end)
            ids = ids[:room] if self.source.on_long == "keep_start" else ids[max(0, len(ids) - room) :]
        return [*ids, *end]

    def _encoder_ids(self, text: str) -> list[int]:
        """The tokenizer adds its own special tokens around the text, which must survive a cut."""
        cut = self.facts.max_tokens is not None and self.source.on_long != "reject"
        encoded: Any = self.tokenizer(
            text, truncation=cut, max_length=self.facts.max_tokens if cut else None, verbose=False
        )
        return encoded.input_ids
