"""What the reward server makes of a request, and which tokens of a text it scores."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.reward.query import BadRequest, ModelFacts, TextTokens, read_queries
from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

BOS, EOS, USER = (SPECIAL_TOKENS.index(token) for token in ("<s>", "</s>", "<|user|>"))


def body(**asked: Any) -> bytes:
    return json.dumps(asked).encode()


def tokens(*, max_tokens: int | None = None, is_decoder: bool = True, **options: Any) -> TextTokens:
    source = ServedModel(type="model", path="rm", **options)
    return TextTokens(source, make_tokenizer(), ModelFacts(max_tokens, is_decoder))


def letters(text: str) -> list[int]:
    return make_tokenizer()(text, add_special_tokens=False).input_ids


def test_a_request_of_our_own_client() -> None:
    queries = read_queries(body(query=["ab", "cd"], prompts=["a", "c"], labels=[1, None], more="ignored"))
    assert queries.query == ["ab", "cd"]
    told = [(item.prompt.prompt, item.response, item.prompt.columns) for item in queries.items]
    assert told == [("a", "b", {"label": 1}), ("c", "d", {"label": None})]


def test_a_model_needs_neither_prompts_nor_labels() -> None:
    queries = read_queries(body(query=["ab"]))
    assert queries.labels == [None]
    with pytest.raises(BadRequest, match=r"no 'prompts'.*reward function"):
        _ = queries.items


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (b"[1", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "the body is a list; wanted"),
        (b"{}", "no 'query'"),
        (body(query="ab"), "'query' is a str; wanted a list of texts"),
        (body(query=["ab", 3]), r"query\[1\] is a int"),
        (body(query=["\ud800"]), r"query\[0\].*Unicode"),
        (body(query=["a"], prompts=["a", "b"]), "'prompts' has 2 items and 'query' 1"),
        (body(query=["a"], labels=[]), "'labels' has 0 items and 'query' 1"),
        (body(query=["a"], labels={"a": 1}), "'labels' is a dict"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(asked: bytes, told: str) -> None:
    with pytest.raises(BadRequest, match=told) as caught:
        read_queries(asked)
    assert caught.value.status == 400


def test_a_response_must_be_told_from_its_prompt() -> None:
    with pytest.raises(BadRequest, match=r"query 1 does not begin with prompts\[1\]"):
        _ = read_queries(body(query=["ab", "cd"], prompts=["a", "d"])).items


def test_special_tokens_are_taken_as_such_and_a_first_one_is_never_doubled() -> None:
    assert tokens().of(["<s><|user|>a</s>", "a"]) == [[BOS, USER, *letters("a"), EOS], [BOS, *letters("a")]]


def test_the_end_is_appended_once_where_it_is_wanted() -> None:
    assert tokens(append_eos=True).of(["a", "a</s>"]) == [[BOS, *letters("a"), EOS]] * 2


@pytest.mark.parametrize(
    ("on_long", "append_eos", "wanted"),
    [
        ("keep_start", False, [BOS, *letters("abc")]),
        ("keep_end", False, letters("cdef")),
        ("keep_start", True, [BOS, *letters("ab"), EOS]),
        ("keep_end", True, [*letters("def"), EOS]),
    ],
)
def test_a_long_text_is_cut_and_keeps_its_end_token(
    on_long: str, append_eos: bool, wanted: list[int]
) -> None:
    assert tokens(max_tokens=4, on_long=on_long, append_eos=append_eos).of(["abcdef"]) == [wanted]


@pytest.mark.parametrize("append_eos", [False, True])
def test_a_text_that_fits_is_never_cut(append_eos: bool) -> None:
    made = tokens(max_tokens=3 + append_eos, on_long="keep_end", append_eos=append_eos)
    assert made.of(["ab"]) == [[BOS, *letters("ab"), *[EOS] * append_eos]]


def test_a_long_text_is_refused_by_default() -> None:
    with pytest.raises(BadRequest, match=r"query 1 has 7 tokens; rm reads 4 at most") as caught:
        tokens(max_tokens=4).of(["a", "abcdef"])
    assert caught.value.status == 413


def test_an_encoder_keeps_the_frame_of_its_tokenizer() -> None:
    made = tokens(max_tokens=3, is_decoder=False, on_long="keep_end").of(["abcdef", "a"])
    assert made == [[BOS, *letters("ef")], [BOS, *letters("a")]]
