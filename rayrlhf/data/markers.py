"""Escaping of chat-template markers in message contents: only the template may write its special tokens.

A text may contain the template's markers, such as a question about `<|im_end|>`, or `</s>` in HTML. Encoded
as special tokens they would end turns and open others, in prompts and in answers. They are therefore encoded
as plain characters, as the tokenizers of Llama, Mistral and OpenAI do with contents. Special tokens that the
template does not use, such as `<|fim_prefix|>`, are encoded as tokens.

While a conversation is rendered, each such marker in it is split by a character that no text contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rayrlhf.data.rows.row import BadRow, quoted
from rayrlhf.data.template import PROBE, PROBE_CALL, STAND_IN, apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "\ufdd0"  # a noncharacter of Unicode, for internal use
NEUTRAL = "marker"  # replaces a marker: ordinary letters
# How a template tests for a token in a content: '</think>' in content, content.split('</think>').
ASKED_BEFORE = (
    r"\.(?:r?split|r?partition|startswith|endswith|replace|r?find|r?index|count|[lr]?strip)\(\s*['\"]"
)
ASKED_BEHIND = r"""['"]\s*(?:not\s+)?in\b"""


@dataclass(frozen=True)
class Markers:
    """Special tokens of a tokenizer with its chat template."""

    all_special: tuple[str, ...]  # texts of all special tokens, longest first
    own: tuple[str, ...]  # written by the template, and the tokenizer's bos, eos and pad
    closing: tuple[str, ...]  # written by the template after an answer, and eos


def markers_of(tokenizer: PreTrainedTokenizerBase) -> Markers:
    return _markers_of(tokenizer, _template_text(tokenizer))


@lru_cache(maxsize=8)
def _markers_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Markers:
    special = special_texts(tokenizer)
    framing = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    rendered = "".join(_probes(tokenizer))
    own = {token for token in special if token in template or token in rendered or token in framing}
    asked = {token.replace("/", "") for token in special if _is_asked_for(token, template)}
    own = {token for token in own if token.replace("/", "") not in asked}
    behind = rendered.rpartition(STAND_IN)[2]
    closing = {token for token in own if token in behind or token == tokenizer.eos_token}
    return Markers(special, _longest_first(own), _longest_first(closing))


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return template or ""


def _is_asked_for(token: str, template: str) -> bool:
    text = re.escape(token)
    return re.search(f"{ASKED_BEFORE}{text}", template) is not None or (
        re.search(f"""['"]{text}{ASKED_BEHIND}""", template) is not None
    )


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Text that the template writes around turns of all roles, the answer last."""
    system, tool = {"role": "system", "content": "probe"}, {"role": "tool", "content": "probe"}
    answer = {"role": "assistant", "content": STAND_IN}
    for messages, opened in (
        ([system, PROBE], True),
        ([PROBE], True),
        ([PROBE, PROBE_CALL, tool], False),
        ([PROBE, answer], False),
    ):
        if tokenizer.chat_template is not None:
            try:
                yield apply_template(messages, tokenizer, add_generation_prompt=opened)
            except BadRow:
                continue  # a template without this role has no marker for it


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


@lru_cache(maxsize=8)
def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of all special tokens, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _longest_first(text for text in {*added, *tokenizer.all_special_tokens} if text)


@lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens: engines omit them from the text of a response."""
    ids: Any = tokenizer.convert_tokens_to_ids(list(special_texts(tokenizer)))
    return frozenset(ids)


def cut(value: Any, texts: Sequence[str]) -> Any:
    """Split every occurrence of `texts` in a text, or in all texts of lists and objects, by `CUT`."""
    if isinstance(value, str):
        for text in texts:
            if len(text) > 1 and text in value:
                value = value.replace(text, f"{text[0]}{CUT}{text[1:]}")
        return value
    if isinstance(value, Mapping):
        return {cut(key, texts): cut(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cut(item, texts) for item in value]
    return value


def whole(text: str) -> str:
    """Undo `cut`."""
    return text.replace(CUT, "")


def found_in(value: Any, texts: Sequence[str]) -> list[str]:
    """Which of `texts` occur anywhere in a value."""
    if isinstance(value, str):
        return [text for text in texts if text in value]
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    if not isinstance(items, list | tuple):
        return []
    found = {text for item in items for text in found_in(item, texts)}
    return [text for text in texts if text in found]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text that contains its special tokens; those that were cut are encoded as plain text.

    Raises `BadRow` if the tokenizer cannot encode them as plain text.
    """
    if CUT not in text:
        return _ids(text, tokenizer)
    texts = special_texts(tokenizer)
    special = re.compile("|".join(map(re.escape, texts)))
    neutral = re.sub("|".join(re.escape(cut(t, [t])) for t in texts), NEUTRAL, text)
    if _ids(neutral, tokenizer) != [i for piece in _pieces(neutral, special) for i in _ids(piece, tokenizer)]:
        raise _unencodable(text, special, tokenizer)  # it encodes the beginning of a text differently
    ids: list[int] = []
    for piece in _pieces(text, special):
        is_text = CUT in piece
        piece_ids = _ids(whole(piece), tokenizer, split_special_tokens=is_text)
        if is_text and not set(piece_ids).isdisjoint(tokenizer.all_special_ids):
            raise _unencodable(text, special, tokenizer)
        ids += piece_ids
    return ids


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options).input_ids


def _pieces(text: str, special: re.Pattern[str]) -> list[str]:
    """Split a text into special tokens and the text between them."""
    pieces, start = [], 0
    for match in special.finditer(text):
        pieces += [text[start : match.start()], match[0]]
        start = match.end()
    return [piece for piece in [*pieces, text[start:]] if piece]


def _unencodable(text: str, special: re.Pattern[str], tokenizer: PreTrainedTokenizerBase) -> BadRow:
    found = quoted(dict.fromkeys(special.findall(whole(text[max(0, text.index(CUT) - 1) :]))[:1]))
    return BadRow(
        f"its text contains {found}, a special token of the chat template, and the tokenizer "
        f"{tokenizer.name_or_path} cannot encode it as text; remove it"
    )
