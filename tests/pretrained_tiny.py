"""Tiny models that have been to school for some seconds: they keep to the form of a task, and are bad at it.

Reinforcement learning from random weights would never see a well-formed call. So a clumsy player talks with
the real environment, and the tiny model (tests/tiny_model.py) learns to talk like it, by plain supervised
learning in torch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.tiny_model import make_tiny_model

INITIALIZER_RANGE = 0.06  # the tiny model's own is made for logits that differ, and learns slower
Message = dict[str, str]
# (the conversation so far, the row, a source of chance) -> the next response
Player = Callable[[list[Message], dict[str, Any], random.Random], str]


def make_pretrained(
    path: Path,
    make_environment: Callable[[], Any],
    lessons: Sequence[tuple[Player, int]],
    rows: Sequence[dict[str, Any]],
    *,
    max_turns: int,
    seed: int,
    batch_size: int = 64,
    lr: float = 3e-3,
) -> str:
    """Saves a tiny model that has learnt to play like `player`; returns its folder. Deterministic by seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(path, initializer_range=INITIALIZER_RANGE)
        model: Any = AutoModelForCausalLM.from_config(config)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    num_steps = sum(steps for _, steps in lessons)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    for player in [player for player, steps in lessons for _ in range(steps)]:
        transcripts = [
            transcript(make_environment(), player, rng.choice(rows), rng, max_turns)
            for _ in range(batch_size)
        ]
        input_ids, labels = _batch(transcripts, tokenizer)
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return str(path)


def transcript(
    environment: Any, player: Player, row: dict[str, Any], rng: random.Random, max_turns: int
) -> list[Message]:
    """One conversation of the player with the environment."""
    messages: list[Message] = [{"role": "user", "content": environment.reset(row)}]
    for turn in range(max_turns):
        messages.append({"role": "assistant", "content": player(messages, row, rng)})
        observation, _, done = environment.step(messages[-1]["content"])
        if done or turn + 1 == max_turns:
            break
        messages.append(
            {"role": "user", "content": observation} if isinstance(observation, str) else observation
        )
    return messages


def _batch(transcripts: Sequence[list[Message]], tokenizer: Any) -> tuple[Any, Any]:
    """input_ids and labels [B, T], padded on the right; a label of -100 where the player has not spoken."""
    import torch

    # As the tiny model's chat template has it: <s>, then <|role|>content</s> for every message.
    messages = [message for messages in transcripts for message in messages]
    texts = [f"<|{message['role']}|>{message['content']}</s>" for message in messages]
    encoded = iter(zip(messages, tokenizer(texts, add_special_tokens=False).input_ids, strict=True))
    input_ids: list[list[int]] = []
    labels: list[list[int]] = []
    for conversation in transcripts:
        input_ids.append([tokenizer.bos_token_id])
        labels.append([-100])
        for message, ids in itertools.islice(encoded, len(conversation)):
            spoken = message["role"] == "assistant"
            input_ids[-1] += ids
            labels[-1] += [-100, *(ids[1:] if spoken else [-100] * len(ids[1:]))]
    length = max(map(len, input_ids))
    padded = [ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in input_ids]
    masked = [ids + [-100] * (length - len(ids)) for ids in labels]
    return torch.tensor(padded), torch.tensor(masked)
