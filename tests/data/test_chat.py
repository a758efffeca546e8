"""Prompts as the model sees them.

The tokenizer of tests/tiny_model.py: <pad> 0, <s> 1, </s> 2, <|system|> 3, <|user|> 4, <|assistant|> 5, and
byte b of printable ASCII is b - 25, since the first of them, "!" (33), comes after 8 special tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.chat import prompt_tokenizer, read_chat_template, render_prompt
from rayrlhf.data.rows.row import BadRow, DataError
from tests.tiny_model import make_tokenizer

HI = [79, 80]  # h is 104, i is 105
BE = [73, 76]  # b is 98, e is 101


def ids(text: str) -> list[int]:
    return [ord(char) - 25 for char in text]


def render(prompt: Any, chat_template: str | None = None, **fields: Any) -> tuple[str, list[int]]:
    config = PromptDataConfig.model_validate({"train": "a.jsonl", **fields})
    tokenizer = make_tokenizer(chat_template) if chat_template is not None else make_tokenizer()
    rendered = render_prompt({"prompt": prompt}, config, tokenizer)
    return rendered.text, rendered.ids


def test_a_text_becomes_one_user_message() -> None:
    assert render("hi") == ("<s><|user|>hi</s><|assistant|>", [1, 4, *HI, 2, 5])


def test_the_system_prompt_comes_first() -> None:
    wanted = ("<s><|system|>be</s><|user|>hi</s><|assistant|>", [1, 3, *BE, 2, 4, *HI, 2, 5])
    assert render("hi", system_prompt="be") == wanted
    conversation = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert render(conversation, system_prompt="unlike") == wanted


def test_a_conversation_keeps_its_turns() -> None:
    turns = [("user", "hi"), ("assistant", "be"), ("user", "hi")]
    _, prompt_ids = render([{"role": role, "content": content} for role, content in turns])
    assert prompt_ids == [1, 4, *HI, 2, 5, *BE, 2, 4, *HI, 2, 5]


def test_a_template_without_a_first_token_gets_none() -> None:
    assert render("hi", "{{ messages[0]['content'] }}") == ("hi", HI)


@pytest.mark.parametrize("template, text", [(None, "hi"), ("Q:{}!", "Q:hi!")])
def test_plain_text_begins_with_the_tokenizers_own_first_token(template: str | None, text: str) -> None:
    fields = {"apply_chat_template": False, "input_template": template}
    assert render("hi", **fields) == (f"<s>{text}", [1, *ids(text)])


def test_a_prompt_with_braces_is_no_template() -> None:
    assert render("a{}{b}", apply_chat_template=False, input_template="<{}>")[1] == [1, *ids("<a{}{b}>")]


def test_special_tokens_are_never_doubled() -> None:
    assert render("<s>hi", apply_chat_template=False) == ("<s>hi", [1, *HI])
    assert render("hi", apply_chat_template=False, input_template="<s>{}") == ("<s>hi", [1, *HI])


def test_text_beyond_ascii_survives() -> None:
    assert render("über 🙂", apply_chat_template=False)[0] == "<s>über 🙂"


def test_what_a_row_can_get_wrong() -> None:
    with pytest.raises(BadRow, match=r"holds messages, but data.apply_chat_template is false"):
        render([{"role": "user", "content": "hi"}], apply_chat_template=False)
    with pytest.raises(BadRow, match="the chat template rejects it: no such role"):
        render("hi", "{{ raise_exception('no such role') }}")
    with pytest.raises(BadRow, match="no token that the tokenizer knows"):
        render("hi", "{{ '' }}")
    with pytest.raises(BadRow, match="the role of message 1 in column 'prompt' is not valid Unicode"):
        render([{"role": "\ud800", "content": "hi"}])


def test_a_tokenizer_without_a_template_is_an_error_of_the_config() -> None:
    config = PromptDataConfig.model_validate({"train": "a.jsonl"})
    with pytest.raises(DataError, match=r"data.chat_template, or set data.apply_chat_template=false"):
        render_prompt({"prompt": "hi"}, config, make_tokenizer(None))


def test_a_template_of_the_users_own(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}!")
    fields = {"train": "a.jsonl", "chat_template": str(tmp_path / "own.jinja")}
    config = PromptDataConfig.model_validate(fields)
    tokenizer = prompt_tokenizer(str(tmp_path), chat_template=read_chat_template(config))
    rendered = render_prompt({"prompt": "hi"}, config, tokenizer)
    assert (rendered.text, rendered.ids) == ("hi!", [*HI, *ids("!")])
    assert prompt_tokenizer(str(tmp_path)).chat_template == make_tokenizer().chat_template
    assert read_chat_template(PromptDataConfig.model_validate({"train": "a.jsonl"})) is None
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_chat_template(config)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        make_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        prompt_tokenizer(str(tmp_path))
