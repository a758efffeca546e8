"""Tokens between two responses: an episode has the ids of the conversation rendered as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config.data import PromptDataConfig
from rayrlhf.data.rows.row import BadRow, DataError
from rayrlhf.environments.chat_tokens import Turns, as_messages, check_template
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

# As SmolLM2's and Qwen2.5's: a default system message, and a line break after every turn.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's: trims the content, has no line break after a turn, and a different role name for tools.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Qwen3's: tools have the user role, consecutive ones share a turn, the last answer gets an empty thought.
QWEN3 = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 2's: spaces around answers, the next turn starts with the bos token, and there are only two roles.
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# name: (template, the token that ends an answer)
TEMPLATES = {
    "tiny": (CHAT_TEMPLATE, "</s>"),
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
}
OBSERVATIONS = {
    "text": "84",
    "tool": {"role": "tool", "content": "84"},
    "list": [{"role": "tool", "content": "84"}, {"role": "tool", "content": "85"}, "Go on."],
    "empty": "",
}


def tokenizer_with(template: str | None) -> Any:
    tokenizer = make_tokenizer(template)
    words = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(words, special_tokens=True)
    return tokenizer


def turns_with(template: str | None, **data: Any) -> Turns:
    config = PromptDataConfig.model_validate({"train": ["prompts.jsonl"], **data})
    return Turns(tokenizer_with(template), config)


def encode(turns: Turns, text: str) -> list[int]:
    return turns.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize(
    "opening", ["12*7?", [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]]
)
def test_an_episode_is_the_conversation(name: str, observation: str, opening: Any) -> None:
    template, end = TEMPLATES[name]
    turns = turns_with(template)
    answers = ["<calc>12*7</calc>", "I see.", "It is 84."]
    seen: Any = OBSERVATIONS[observation]
    text, ids = turns.opening(opening)
    messages: list[Any] = as_messages(opening)
    for answer in answers:
        whole: Any = turns.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == whole
        assert ids == encode(turns, whole)
        response_ids = encode(turns, answer + end)
        between, between_ids = turns.between(response_ids, seen)
        ids = [*ids, *response_ids, *between_ids]
        text += answer + between
        messages += [{"role": "assistant", "content": answer}, *as_messages(seen)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_that_did_not_end_its_turn_gets_the_end(name: str) -> None:
    template, end = TEMPLATES[name]
    turns = turns_with(template)
    [end_id] = encode(turns, end)
    assert turns.end_of_turn_id == end_id
    ended = turns.between(encode(turns, "yes" + end), "Sure?")
    stopped = turns.between(encode(turns, "yes"), "Sure?")
    assert ended[0] == stopped[0], "the text has the end of the turn in either case"
    assert stopped[1] == [end_id, *ended[1]]


def test_a_space_before_the_end_is_not_added() -> None:
    """The template renders "yes </s>", the model generated "yes</s>": its tokens are kept."""
    turns = turns_with(LLAMA2)
    assert turns.end_of_turn_id == turns.tokenizer.eos_token_id
    assert turns.between(encode(turns, "yes</s>"), "Sure?")[1] == encode(turns, "<s>[INST] Sure? [/INST]")
    assert turns.between(encode(turns, "yes"), "Sure?")[1] == encode(turns, " </s><s>[INST] Sure? [/INST]")


def test_a_role_that_the_template_does_not_support() -> None:
    turns = turns_with(LLAMA2)
    with pytest.raises(BadRow, match=r"rejects 'tool': Only user and assistant roles are supported!"):
        turns.between([1], {"role": "tool", "content": "84"})


def test_plain_text_is_plain_text() -> None:
    turns = turns_with(None, apply_chat_template=False)
    assert turns.end_of_turn_id is None
    assert turns.opening("12*7=")[1] == [turns.tokenizer.bos_token_id, *encode(turns, "12*7=")]
    assert turns.between(encode(turns, "84"), "\nno\n") == ("\nno\n", encode(turns, "\nno\n"))
    with pytest.raises(BadRow, match=r"of type dict with data.apply_chat_template=false; wanted a text"):
        turns.between([1], {"role": "user", "content": "no"})


def test_the_opening_needs_neither_label_nor_prompt_column() -> None:
    turns = turns_with(CHAT_TEMPLATE, prompt_key="question", label_key="answer", system_prompt="S")
    assert turns.opening("Q")[0] == "<s><|system|>S</s><|user|>Q</s><|assistant|>"


@pytest.mark.parametrize(
    "opening, message",
    [
        ("x" * 60, r"the opening has 64 tokens; data.max_prompt_tokens is 32"),
        ([], "is an empty list"),
        (7, "'opening' holds a value of type int; wanted a text or a list"),
        ([{"role": "assistant", "content": "Hi"}], "end with the assistant's answer"),
    ],
)
def test_bad_openings(opening: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        turns_with(CHAT_TEMPLATE, max_prompt_tokens=32).opening(opening)


@pytest.mark.parametrize(
    "observation, message",
    [
        (None, "an observation of type NoneType; wanted a text, a message"),
        (84, "an observation of type int"),
        ([], "without messages"),
        ([84], "a message of type int"),
        ({"role": "tool"}, "role 'tool' and content None; wanted two texts"),
        ({"content": "84"}, "role None and content '84'"),
        ({"role": "tool", "content": 84}, "content 84"),
        ({"role": "assistant", "content": "84"}, "the policy's own"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_bad_observations(observation: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        turns_with(CHAT_TEMPLATE).between([1], observation)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no template; name one with data.chat_template"),
        ("{{ messages[0]['content'] }}", "omits an answer"),
        ("{{ raise_exception('no answers') }}", "rejects an answer: no answers"),
        # A different end after the last answer than after earlier ones: tokens cannot be continued from it.
        (
            "{% for m in messages %}{{ m['content'] + ('<|eot_id|>' if loop.last else '</s>') }}{% endfor %}",
            r"it ends an answer with '<\|eot_id\|>', but continues it with '</s>Go on",
        ),
    ],
)
def test_unsupported_templates(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_template(tokenizer_with(template))
