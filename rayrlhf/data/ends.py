"""Stop conditions of responses: the model's end of text, the chat template's end of turn, or `stop` strings.

The end of turn often differs from the tokenizer's end of text: a base model trained on ChatML ends its
answers with `<|im_end|>`, while its eos token remains `<|endoftext|>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from rayrlhf.config.data import DataConfig
from rayrlhf.config.model import ModelConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template
from rayrlhf.data.markers import encode, special_ids
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.data.template import STAND_IN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION: dict[str, Any] = {"role": "user", "content": "Well?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": STAND_IN}


@dataclass(frozen=True)
class ResponseEnds:
    """Stop tokens and strings in addition to the model's own end of text."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


def response_ends(
    stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, apply_chat_template: bool
) -> ResponseEnds:
    """Stop conditions for prompts with the chat template, or for plain ones, including the strings of `stop`.

    Engines search for stop strings in text without special tokens: a string that is a special token becomes a
    stop token. Raises `DataError` for a string that contains a special token and more, which cannot match.
    """
    end_of_turn = end_of_turn_id(tokenizer) if apply_chat_template else None
    ids = [] if end_of_turn is None else [end_of_turn]
    texts: list[str] = []
    special = special_ids(tokenizer)
    for text in stop:
        found = encode(text, tokenizer)
        inside = [token for token in found if token in special]
        if not inside:
            texts.append(text)
        elif len(found) == 1:
            ids += found
        else:
            token = tokenizer.convert_ids_to_tokens(inside[0])
            raise DataError(
                f"the stop string {text!r} contains the special token {token!r} and more: engines search "
                f"text without special tokens and would never find it; wanted {token!r} alone, or a text "
                "without it"
            )
    return ResponseEnds(tuple(dict.fromkeys(ids)), tuple(texts))


def ends_of(model: ModelConfig, data: DataConfig) -> Callable[[Sequence[str]], ResponseEnds]:
    """`response_ends` of this model's tokenizer, for prompts as `data` renders them. Raises `DataError`."""
    tokenizer = prompt_tokenizer(model.path, model.trust_remote_code, read_chat_template(data))
    return partial(response_ends, tokenizer=tokenizer, apply_chat_template=data.apply_chat_template)


@lru_cache(maxsize=4)
def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer in the tokenizer's chat template; None if it is ended by text or by
    nothing, or if the template does not accept answers.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        closing = behind_answer(tokenizer, [], generation_prompt=False)
    except BadRow:
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in encode(closing, tokenizer) if token in special), None)


def behind_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool
) -> str:
    """The text that the template writes after an answer that is followed by `messages`. Raises `BadRow`."""
    try:
        text = tokenizer.apply_chat_template(
            [QUESTION, ANSWER, *map(dict, messages)], tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # template code may raise anything
        roles = ", ".join(repr(message["role"]) for message in messages)
        raise BadRow(f"the chat template rejects {roles or 'an answer'}: {error}") from error
    assert isinstance(text, str)
    _, found, behind = text.partition(STAND_IN)
    if not found:
        raise BadRow("the chat template omits an answer when another message follows")
    return behind
