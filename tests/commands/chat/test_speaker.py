"""Answers of a real checkpoint, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.commands.chat.conversation import ChatProblem, Message, Sampling
from rayrlhf.commands.chat.speaker import Transformer, load_speakers
from tests.tiny_model import make_tokenizer

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


def sampling(temperature: float = 0.0, max_new_tokens: int = 24, seed: int = 0, top_k: int = 0) -> Sampling:
    return Sampling(temperature, top_p=1.0, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)


def speaker(path: str) -> Transformer:
    return Transformer("tiny", path, dtype="float32", chat_template=None)


def ask(path: str, how: Sampling, messages: list[Message] = HELLO, stop_after: int | None = None):
    pieces: list[str] = []
    answer = speaker(path).answer(
        messages, how, pieces.append, lambda: stop_after is not None and len(pieces) >= stop_after
    )
    return answer, pieces


@torch.no_grad()
def greedy(path: str, prompt: str, count: int) -> str:
    """One forward pass over everything per token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_without_temperature_it_is_the_likeliest_text(tiny_model: str) -> None:
    answer, pieces = ask(tiny_model, sampling())
    assert answer.text == greedy(tiny_model, "<s><|user|>Hello</s><|assistant|>", 24) != ""
    assert "".join(pieces) == answer.text and len(pieces) > 1
    assert answer.num_tokens == 24 and answer.seconds > 0 and not answer.interrupted


def test_the_seed_decides(tiny_model: str) -> None:
    first, again, other = (ask(tiny_model, sampling(1.0, seed=seed))[0].text for seed in (1, 1, 2))
    assert first == again != other
    assert ask(tiny_model, sampling(1.0, seed=1, top_k=1))[0].text == ask(tiny_model, sampling())[0].text


def test_it_can_be_stopped(tiny_model: str) -> None:
    answer, pieces = ask(tiny_model, sampling(max_new_tokens=400), stop_after=2)
    assert answer.interrupted and answer.num_tokens < 20 and len(pieces) <= 3


def test_a_conversation_that_fills_the_model_is_refused(tiny_model: str) -> None:
    with pytest.raises(ChatProblem, match=r"has 5\d\d tokens, tiny reads 512: /reset"):
        ask(tiny_model, sampling(), [{"role": "user", "content": "x" * 520}])
    answer, _ = ask(tiny_model, sampling(1.0, max_new_tokens=50), [{"role": "user", "content": "x" * 500}])
    assert 1 <= answer.num_tokens <= 512 - 504


def test_a_base_without_template_uses_that_of_the_tuned_model(tiny_model: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    base, tuned = load_speakers(tiny_model, str(tmp_path), dtype="float32", chat_template=None)
    assert [base.name, tuned.name] == ["base", "tuned"]
    assert (
        base.answer(HELLO, sampling(), lambda _: None, lambda: False).text
        == ask(tiny_model, sampling())[0].text
    )
    with pytest.raises(ChatProblem, match="has no chat template; give one with --chat-template"):
        load_speakers(str(tmp_path), None, dtype="float32", chat_template=None)
