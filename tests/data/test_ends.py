"""Where responses end: the template's end of turn, and special tokens among the stop strings."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.data.ends import ResponseEnds, end_of_turn_id, response_ends
from rayrlhf.data.rows.row import DataError
from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

EOS, EXTRA, USER = (SPECIAL_TOKENS.index(token) for token in ("</s>", "<|extra|>", "<|user|>"))
# As a base model is given ChatML: its turns end with a token that is not its eos token.
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|extra|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT_ONLY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
BOTH = CHATML.replace("'<|extra|>\n'", "'<|extra|>\n</s>'")
NOTHING_BEHIND = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
NO_ANSWERS = "{{ messages[0]['content'] }}{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, EXTRA), (BOTH, EXTRA), (TEXT_ONLY, None), (NOTHING_BEHIND, None), (NO_ANSWERS, None)],
)
def test_17b_the_template_says_where_a_turn_ends(template: str, end: int | None) -> None:
    assert end_of_turn_id(make_tokenizer(template)) == end


def test_17b_the_tiny_models_own_template_and_none() -> None:
    assert end_of_turn_id(make_tokenizer()) == EOS
    assert end_of_turn_id(make_tokenizer(None)) is None


def ends(stop: list[str], **options: Any) -> ResponseEnds:
    return response_ends(stop, make_tokenizer(CHATML), **{"apply_chat_template": True, **options})


def test_17b_responses_end_with_the_turn_where_the_template_is_applied() -> None:
    assert ends([]) == ResponseEnds((EXTRA,), ())
    assert ends([], apply_chat_template=False) == ResponseEnds((), ())


def test_17b_a_stop_string_that_is_a_special_token_is_found_as_that() -> None:
    assert ends(["<|extra|>", "\n\n", "<|user|>"]) == ResponseEnds((EXTRA, USER), ("\n\n",))


@pytest.mark.parametrize("stop", ["<|extra|>\n", "done<|user|>"])
def test_17b_one_that_no_engine_could_find_is_refused(stop: str) -> None:
    with pytest.raises(DataError, match=r"contains the special token .* and more: .*wanted"):
        ends([stop])
