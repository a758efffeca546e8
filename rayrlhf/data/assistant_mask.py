"""Loss mask over the assistant tokens of a rendered conversation: exact, or an error.

A model is trained, after exactly the tokens that inference would send, on the tokens that it should emit
next, including the one that ends its turn. Text that a template puts around the turns is never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rayrlhf.data.chat import as_text, decode_prompt
from rayrlhf.data.markers import cut, encode, found_in, special_texts, whole
from rayrlhf.data.rows.messages import Message
from rayrlhf.data.rows.row import BadRow, DataError, check_unicode
from rayrlhf.data.template import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_TAG = re.compile(r"{%-?\s*generation\s*-?%}")
Span = tuple[int, int]  # start, end (exclusive)


@dataclass(frozen=True)
class MaskedConversation:
    """A tokenised conversation with loss mask, up to the end of its last trained turn."""

    input_ids: list[int]  # [T]
    loss_mask: list[int]  # [T]
    prompt_tokens: int  # tokens before the last trained turn: what inference would send for it
    notes: tuple[str, ...] = ()  # changes made to the row, to be counted


def mask_turns(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
) -> MaskedConversation:
    """Token ids of `messages` and a loss mask over the turns with these indices (ascending).

    A turn is the difference between the rendering that ends with it and the rendering with a generation
    prompt in its place, up to the last special token that the template writes in it, which ends the turn. If
    the template has `{% generation %}` tags, only the text inside them and the end token are loss tokens.

    Raises `DataError` for a template that renders the beginning of a conversation differently when more
    follows, as some drop earlier reasoning: the context of the loss tokens would differ from what inference
    sends. Raises `BadRow` if a token spans the boundary between prompt and answer.
    """
    messages, tools, notes = as_text(messages, tools, tokenizer)
    spans, text = _turn_spans(messages, turns, tokenizer, tools)
    ends = _turn_ends(messages, turns, tokenizer, tools, spans, text)
    check_unicode(text, "the conversation")  # including roles and other keys
    tags = _tag_spans(messages[: turns[-1] + 1], tokenizer, tools)
    tokens = _Tokens.of(text, [start for start, _ in spans], tokenizer)
    loss_mask = [0] * len(tokens.ids)
    prompt_tokens = stop = 0
    for (start, end), turn_end in zip(spans, ends, strict=True):
        prompt_tokens = tokens.before(start)
        stop = tokens.before(turn_end)
        inside = [(start, end)] if tags is None else [(a, b) for a, b in tags if a < end and b > start]
        for first, last in inside:
            begin = tokens.before(max(first, start))
            after = stop if last >= end else min(stop, tokens.before(last))
            loss_mask[begin:after] = [1] * max(0, after - begin)
        if inside:
            loss_mask[stop - 1] = 1
    if not any(loss_mask):
        raise BadRow(
            "the {% generation %} tags of the chat template mark nothing in it; there are no loss tokens"
        )
    return MaskedConversation(tokens.ids[:stop], loss_mask[:stop], prompt_tokens, tuple(notes))


@dataclass(frozen=True)
class _Tokens:
    """A text and its token ids; maps a position in the text to the number of tokens before it."""

    ids: list[int]
    text: str
    cut: int  # the text was encoded in two parts, split here; 0: in one
    cut_tokens: int
    tokenizer: PreTrainedTokenizerBase
    known: dict[int, list[int]]  # cache: ids of the text up to a position

    @classmethod
    def of(cls, text: str, starts: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> _Tokens:
        """Encodes a text whose assistant turns start at these positions.

        If a token spans the only start, the answer is encoded separately from the prompt, as a model would
        begin it. With several turns, later prompts would then differ from what inference sends.
        """
        ids = encode(text, tokenizer)
        if len(starts) > 1:
            return cls(ids, text, 0, 0, tokenizer, {len(text): ids})
        start, prompt_ids = starts[0], encode(text[: starts[0]], tokenizer)
        cut, cut_tokens = 0, 0
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = join(prompt_ids, text[start:], ids, tokenizer)
            cut, cut_tokens = start, len(prompt_ids)
        return cls(ids, text, cut, cut_tokens, tokenizer, {len(text): ids, start: prompt_ids})

    def before(self, position: int) -> int:
        """Number of tokens before a token boundary. Raises `BadRow` if a token spans the position."""
        before = self._encoded(position)
        if self.ids[: len(before)] != before:
            raise self._straddling(position)
        return len(before)

    def _encoded(self, position: int) -> list[int]:
        if position not in self.known:
            head = self.ids[: self.cut_tokens] if position >= self.cut else []
            rest = self.text[self.cut if head else 0 : position]
            self.known[position] = [*head, *encode(rest, self.tokenizer)]
        return self.known[position]

    def _straddling(self, position: int) -> BadRow:
        left = whole(self.text[max(0, position - 10) : position])
        right = whole(self.text[position : position + 10])
        return BadRow(
            f"a token spans the boundary of a turn, between {left!r} and {right!r}, so no loss mask is "
            "exact; change the text there, or set data.learn=last_response"
        )


def _turn_spans(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None,
) -> tuple[list[Span], str]:
    """Character spans of the turns in the rendered text, and the text up to the last of them."""

    def render(count: int, opened: bool) -> str:
        return apply_template(messages[:count], tokenizer, tools=tools, add_generation_prompt=opened)

    text = render(turns[-1] + 1, False)
    spans = []
    for turn in turns:
        opened = render(turn, True)
        closed = text if turn == turns[-1] else render(turn + 1, False)
        if not closed.startswith(opened):
            raise DataError(
                "the chat template renders the assistant's turn differently from its generation prompt: "
                f"{_tail(opened)} as the generation prompt, but {_difference(closed, opened)} with the "
                "answer; set another template with data.chat_template"
            )
        if not text.startswith(closed):
            raise DataError(
                "the chat template renders an earlier assistant turn differently when more turns follow "
                f"({_difference(closed, text)} becomes {_difference(text, closed)}), so training and "
                "inference would see different text; set data.learn=last_response, or another "
                "data.chat_template"
            )
        spans.append((len(opened), len(closed)))
    return spans, text


def _turn_ends(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None,
    spans: Sequence[Span],
    text: str,
) -> list[int]:
    """End position of each turn: after the last special token that the template writes in it.

    Special tokens within an answer's text do not end it; with such text, a rendering without them gives the
    length of what the template writes after the end.
    """
    special = special_texts(tokenizer)
    plain_spans, plain_text = spans, text
    if found_in(messages[: turns[-1] + 1], special):
        plain = cut(list(messages), special)
        plain_spans, plain_text = _turn_spans(plain, turns, tokenizer, cut(tools, special))
    ending = re.compile("|".join(map(re.escape, _ending_texts(tokenizer))) or "(?!)")
    ends = []
    for (_, end), (start, plain_end) in zip(spans, plain_spans, strict=True):
        found = [match.end() for match in ending.finditer(plain_text, start, plain_end)]
        if not found:
            raise DataError(
                "the chat template does not end the assistant's turn with a special token, so the model "
                f"would not learn to stop: it ends with {_tail(text[:end])}; "
                "set another template with data.chat_template"
            )
        ends.append(end - (plain_end - found[-1]))
    return ends


def _tail(text: str) -> str:
    return repr("…" + whole(text[-30:]))


def _difference(text: str, other: str) -> str:
    """The text around the position where it begins to differ from the other."""
    same = next(
        (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )
    return repr("…" + whole(text[max(0, same - 20) : same + 20]) + "…")


def _tag_spans(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> list[Span] | None:
    """Character spans enclosed by `{% generation %}` tags; None for a template without them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)
    if not GENERATION_TAG.search(template):
        return None
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        conversations=[[dict(message) for message in messages]],
        tools=list(tools) if tools else None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **special_tokens,
    )
    _, spans = rendered
    return [(start, end) for start, end in spans[0]]


def join(
    prompt_ids: list[int], answer: str, whole_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """`prompt_ids` followed by the ids of the answer, encoded separately.

    Raises `BadRow` if that does not decode to the text of `whole_ids`: some tokenizers insert a blank at the
    beginning of a text.
    """
    joined = [*prompt_ids, *encode(answer, tokenizer)]
    if decode_prompt(joined, tokenizer) != decode_prompt(whole_ids, tokenizer):
        raise BadRow(
            f"a token spans the boundary between the prompt and the answer {whole(answer[:20])!r}, and the "
            "answer cannot be encoded separately; change the end of the prompt or the start of the answer"
        )
    return joined


def _ending_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that may end a turn: all but the one that begins a text (unless it also ends one)."""
    bos = tokenizer.bos_token if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    return [text for text in special_texts(tokenizer) if text != bos]


@lru_cache(maxsize=4)
def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of special tokens that may end a turn."""
    ids: Any = tokenizer.convert_tokens_to_ids(_ending_texts(tokenizer))
    return frozenset(ids)


def assistant_turns(messages: Sequence[Message], learn: str) -> list[int]:
    """Indices of the turns to train on by `data.learn`; a weight of 0 excludes a turn.

    Raises `BadRow` if that leaves nothing, or if the weights contradict `data.learn`.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    weighted = [index for index in turns if messages[index].get("weight") != 0]
    if learn == "all" and weighted != turns:
        raise BadRow(
            "a message is excluded from the loss (weight: 0 or similar), but data.learn=all trains on "
            "everything; remove the flag, or set data.learn=responses"
        )
    if learn != "responses":
        weighted = [index for index in weighted if index == turns[-1]]
    if not weighted:
        which = "every message" if learn == "responses" else "the last message"
        raise BadRow(
            f"{which} of the assistant has the weight 0 (or train: false, or similar); "
            "there are no loss tokens"
        )
    return weighted
