"""What the reward server makes of a request, and which tokens of a text it scores."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayrlhf.config.serve_reward import ServedModel
from rayrlhf.reward_server.requests import BadRequest, ModelFacts, TextTokens, cut_to_readable, read_queries
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
    items = [(item.prompt.prompt, item.response, item.prompt.columns) for item in queries.items]
    assert items == [("a", "b", {"label": 1}), ("c", "d", {"label": None})]


def test_a_model_needs_neither_prompts_nor_labels() -> None:
    queries = read_queries(body(query=["ab"]))
    assert queries.labels == [None]
    with pytest.raises(BadRequest, match=r"no 'prompts'.*reward function"):
        _ = queries.items


@pytest.mark.parametrize(
    ("asked", "message"),
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
def test_what_is_wrong_with_a_request_is_said(asked: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        read_queries(asked)
    assert caught.value.status == 400


def test_a_response_must_be_separable_from_its_prompt() -> None:
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
    with pytest.raises(BadRequest, match=r"query 1 has 7 tokens; rm reads at most 4") as caught:
        tokens(max_tokens=4).of(["a", "abcdef"])
    assert caught.value.status == 413


def test_an_encoder_keeps_the_frame_of_its_tokenizer() -> None:
    made = tokens(max_tokens=3, is_decoder=False, on_long="keep_end").of(["abcdef", "a"])
    assert made == [[BOS, *letters("ef")], [BOS, *letters("a")]]


def test_a_number_of_queries_is_refused_with_the_limit() -> None:
    assert read_queries(body(query=["a"] * 3), max_queries=3).query == ["a"] * 3
    with pytest.raises(BadRequest, match=r"'query' has 4 items; this server accepts at most 3") as caught:
        read_queries(body(query=["a"] * 4), max_queries=3)
    assert caught.value.status == 413 and caught.value.limit == {"server.max_queries": 3}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (b'{"query": ["a"], "query": ["b"]}', r"duplicate key 'query' in"),
        (b'{"query": ["a"], "labels": [{"a": {"x": 1, "x": 1}}]}', r"duplicate key 'x' in"),
        (b'{"query": ["a"], "labels": [NaN]}', "NaN is not a JSON number"),
        (b'{"query": ["a"], "labels": [-1e400]}', "the number '-1e400' is too large"),
        (b'{"query": ["a"], "labels": [' + b"9" * 5000 + b"]}", "4300 digits"),
        ('{"query": ["a"]}'.encode("utf-16"), "utf-8"),
    ],
)
def test_json_that_others_would_take_is_refused(asked: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        read_queries(asked)
    assert caught.value.status == 400


@pytest.mark.parametrize("on_long", ["keep_start", "keep_end"])
@pytest.mark.parametrize("append_eos", [False, True])
def test_what_is_cut_before_it_is_tokenised_changes_no_token(on_long: Any, append_eos: bool) -> None:
    """4 + 64 tokens of 13 characters at most: of 100,000 characters 884 are read."""
    text = "".join(chr(ord("a") + i % 26) for i in range(100_000))
    source = ServedModel(type="model", path="rm", on_long=on_long, append_eos=append_eos)
    facts = ModelFacts(4, is_decoder=True, characters_per_token=13)
    [short] = cut_to_readable([text], source, facts, max_request_tokens=1000)
    assert short == (text[:884] if on_long == "keep_start" else text[-884:])
    made = tokens(max_tokens=4, on_long=on_long, append_eos=append_eos)
    assert made.of([short]) == made.of([text])


def test_the_bound_by_characters_refuses_nothing_that_can_be_read() -> None:
    """The longest token has 13 characters: four of them are 52 characters, and are read."""
    source = ServedModel(type="model", path="rm")
    facts = ModelFacts(5, is_decoder=True, characters_per_token=13)
    texts = ["<|assistant|>" * 4]
    assert cut_to_readable(texts, source, facts, max_request_tokens=10) == texts
    assert len(tokens(max_tokens=5).of(texts)[0]) == 5  # with the first one, which the tokenizer adds
