"""Which tokens of a rendered conversation are the assistant's to learn: exact, or refused.

A model is to learn, after exactly the tokens that inference would send, the tokens that it should then emit,
the one that ends its turn included. What a template puts around the turns is never learnt.
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
    """A conversation up to the end of its last learnt turn."""

    input_ids: list[int]  # [T]
    loss_mask: list[int]  # [T]
    prompt_tokens: int  # tokens before the last learnt turn: what inference would send for it
    notes: tuple[str, ...] = ()  # what was changed in the row, to be counted


def mask_turns(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None = None,
) -> MaskedConversation:
    """Token ids of `messages` and a mask over the turns with these indices, ascending, the last one last.

    A turn is what a rendering that ends with it has more than the one that ends where the assistant is to
    speak, up to the last special token that the template writes in it, which is the one that ends the turn.
    Where the template has `{% generation %}` tags, only what stands inside them and the ending token are
    learnt.

    Raises `DataError` for a template that renders the beginning of a conversation otherwise when more
    follows, as some drop earlier reasoning: what the mask covers would not be what inference sends. Raises
    `BadRow` where a token reaches over the boundary between prompt and answer.
    """
    messages, tools, notes = as_text(messages, tools, tokenizer)
    spans, text = _turn_spans(messages, turns, tokenizer, tools)
    ends = _turn_ends(messages, turns, tokenizer, tools, spans, text)
    check_unicode(text, "the conversation")  # roles and other keys too
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
            "the {% generation %} tags of the chat template mark nothing in it; there is nothing to learn"
        )
    return MaskedConversation(tokens.ids[:stop], loss_mask[:stop], prompt_tokens, tuple(notes))


@dataclass(frozen=True)
class _Tokens:
    """A text and its token ids, which tell how many tokens stand before a place in the text."""

    ids: list[int]
    text: str
    cut: int  # the text was encoded in two parts, cut here; 0 for in one
    cut_tokens: int
    tokenizer: PreTrainedTokenizerBase
    known: dict[int, list[int]]  # ids of the text up to a place, where they were asked for

    @classmethod
    def of(cls, text: str, starts: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> _Tokens:
        """Encodes a text whose turns of the assistant start at these places.

        Where a token reaches over the only start, the answer is encoded apart from the prompt, as a model
        would begin it. With several turns that would leave later prompts unlike what inference sends.
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
        """Tokens before a place at which one ends. Raises `BadRow` where a token reaches over it."""
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
            f"a token reaches over the boundary of a turn, between {left!r} and {right!r}, so no mask is "
            "exact; mend the text there, or set data.learn=last_response"
        )


def _turn_spans(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict[str, Any]] | None,
) -> tuple[list[Span], str]:
    """Where in the rendered text the turns stand, in characters, and the text up to the last of them."""

    def render(count: int, opened: bool) -> str:
        return apply_template(messages[:count], tokenizer, tools=tools, add_generation_prompt=opened)

    text = render(turns[-1] + 1, False)
    spans = []
    for turn in turns:
        opened = render(turn, True)
        closed = text if turn == turns[-1] else render(turn + 1, False)
        if not closed.startswith(opened):
            raise DataError(
                "the chat template does not continue what it opens for the assistant's turn: it renders "
                f"{_tail(opened)} when the answer is still to come, but with the answer "
                f"{_parting(closed, opened)}; name another template with data.chat_template"
            )
        if not text.startswith(closed):
            raise DataError(
                "the chat template renders an earlier turn of the assistant otherwise when more turns follow "
                f"({_parting(closed, text)} becomes {_parting(text, closed)}), so inference would not see "
                "what is learnt; set data.learn=last_response, or data.chat_template to another template"
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
    """Where in the text each turn ends: behind the last special token that the template writes in it.

    One in the words of an answer ends nothing, so that with such words a rendering in which they have none
    tells how much the template writes behind the end.
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
                "name another template with data.chat_template"
            )
        ends.append(end - (plain_end - found[-1]))
    return ends


def _tail(text: str) -> str:
    return repr("…" + whole(text[-30:]))


def _parting(text: str, other: str) -> str:
    """The text around the place where it begins to differ from the other."""
    same = next(
        (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )
    return repr("…" + whole(text[max(0, same - 20) : same + 20]) + "…")


def _tag_spans(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> list[Span] | None:
    """What `{% generation %}` tags enclose, in characters; None for a template without them."""
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
    """`prompt_ids` and the ids of the answer alone.

    Raises `BadRow` where that is not the text of `whole_ids`: some tokenizers put a blank before what they
    take for the beginning of a text.
    """
    joined = [*prompt_ids, *encode(answer, tokenizer)]
    if decode_prompt(joined, tokenizer) != decode_prompt(whole_ids, tokenizer):
        raise BadRow(
            f"a token reaches over the boundary between the prompt and the answer {whole(answer[:20])!r}, "
            "and the answer cannot be encoded apart; begin or end one of them otherwise"
        )
    return joined


def _ending_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that may end a turn: all but the one that begins a text (unless it ends one as well)."""
    bos = tokenizer.bos_token if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    return [text for text in special_texts(tokenizer) if text != bos]


@lru_cache(maxsize=4)
def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of special tokens that may end a turn."""
    ids: Any = tokenizer.convert_tokens_to_ids(_ending_texts(tokenizer))
    return frozenset(ids)


def assistant_turns(messages: Sequence[Message], learn: str) -> list[int]:
    """Indices of the turns to learn with `data.learn`; a weight of 0 leaves a turn out.

    Raises `BadRow` where that leaves nothing, or contradicts what is to be learnt.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    weighted = [index for index in turns if messages[index].get("weight") != 0]
    if learn == "all" and weighted != turns:
        raise BadRow(
            "a message is marked as not to be learnt (weight: 0 or alike), but data.learn=all learns "
            "everything; remove the mark, or set data.learn=responses"
        )
    if learn != "responses":
        weighted = [index for index in weighted if index == turns[-1]]
    if not weighted:
        which = "every message" if learn == "responses" else "the last message"
        raise BadRow(
            f"{which} of the assistant has the weight 0 (or train: false, or alike); "
            "there is nothing to learn"
        )
    return weighted
