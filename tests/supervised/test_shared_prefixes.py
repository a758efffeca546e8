"""Losses and gradients of pairs are the same if their prompt is computed once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from rayrlhf.batch import ExampleBatch
from rayrlhf.models.attention import VARLEN_SDPA
from rayrlhf.models.heads import ScoreModel
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.samples import Example, TokenSequence
from rayrlhf.supervised.dpo import PreferenceTask
from rayrlhf.supervised.reference_table import packed
from rayrlhf.supervised.rm import RewardModelTask
from rayrlhf.supervised.task import Task
from tests.integration.supervised_runs import job

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "attn_implementation": VARLEN_SDPA,
}


def pairs() -> list[Example]:
    generator = torch.Generator().manual_seed(2)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 64, (count,), generator=generator).tolist()

    made = []
    for row in range(3):
        prompt = tokens(18 + row)
        answers = [tokens(4 + row), tokens(9)]
        sequences = tuple(
            TokenSequence([*prompt, *answer], [0] * len(prompt) + [1] * len(answer)) for answer in answers
        )
        made.append(Example(row, sequences, value=0.5))
    return made


def module_and_task(name: str, config: Any) -> tuple[Any, Task]:
    torch.manual_seed(4)
    if name == "dpo":
        module: Any = PolicyModel(LlamaForCausalLM(LlamaConfig(**CONFIG)), chunk_tokens=16)
        task: Task = PreferenceTask.__new__(PreferenceTask)
    else:
        module = ScoreModel(LlamaModel(LlamaConfig(**CONFIG)), nn.Linear(32, 1))
        task = RewardModelTask.__new__(RewardModelTask)
    task.config = config
    return module, task


@pytest.mark.parametrize("name", ["dpo", "rm"])
def test_pairs(tmp_path: Path, name: str) -> None:
    config = job(tmp_path, "models/tiny", name)
    module, task = module_and_task(name, config)
    found = []
    for share_prefixes in (False, True):
        train = config.train.model_copy(update={"share_prefixes": share_prefixes})
        setting: Any = SimpleNamespace(train=train, data=config.data)
        batch: ExampleBatch = packed(pairs(), setting)
        assert batch.num_rows == batch.num_tokens - share_prefixes * (18 + 19 + 20)
        if name == "dpo":
            object.__setattr__(batch, "ref_sums", torch.linspace(-40.0, -20.0, 6))
        module.zero_grad()
        measured = task.measure(task.forward(module, batch), batch)
        torch.as_tensor(measured.loss.total).sum().backward()
        found.append((measured, {n: p.grad.clone() for n, p in module.named_parameters()}))
    (plain, gradients), (shared, of_shared) = found
    torch.testing.assert_close(shared.loss.total, plain.loss.total, rtol=1e-5, atol=1e-5)
    for key, mean in plain.metrics.items():
        torch.testing.assert_close(shared.metrics[key].total, mean.total, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        assert (of_shared[key] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-3), key
