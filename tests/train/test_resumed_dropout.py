"""A DeepSpeed learner that trains with dropout, saved and taken up again: its next masks are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from transformers import GPT2Config, GPT2LMHeadModel

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import PackedBatch, cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.dropout import keep_dropout
from rayrlhf.models.load import load_policy

pytestmark = pytest.mark.slow

BATCH = PackedBatch(
    input_ids=torch.arange(8, 24),
    position_ids=position_ids_of([16]),
    cu_seqlens=cu_seqlens_of([16]),
    loss_mask=torch.tensor([0.0, *[1.0] * 15]),
)


def forward(module: Any, batch: PackedBatch) -> torch.Tensor:
    return module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask).logprobs


def loss(logprobs: torch.Tensor, _: PackedBatch) -> tuple[torch.Tensor, Metrics]:
    return -logprobs.mean(), Metrics()


def not_finite(logprobs: torch.Tensor, _: PackedBatch) -> tuple[torch.Tensor, Metrics]:
    return logprobs.mean() * torch.inf, Metrics()


def train(_: int, model_path: str, folder: str) -> None:
    """In a separate process: writes the losses."""
    from rayrlhf.train.learner import Learner, Term
    from rayrlhf.train.random_states import RandomStates

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed insists
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    kept = Path(folder) / "checkpoint"
    kept.mkdir()
    (kept / "state.json").write_text(json.dumps({"step": 2}))

    def begin() -> tuple[Learner, RandomStates]:
        config = ModelConfig(path=model_path, dtype="float32")
        policy = load_policy(config, model_path, device=torch.device("cpu"), chunk_tokens=64)
        keep_dropout(policy)
        settings = TrainConfig.model_validate({"num_steps": 4, "zero_stage": 1, "max_bad_steps": 3})
        learner = Learner(policy, settings, lr=1e-3, dtype=torch.float32, name="model")
        return learner, RandomStates(0, rank=0, world_size=1)

    def steps(learner: Learner, *numbers: int) -> list[float]:
        return [learner.update(Term([BATCH], forward, loss), step=n).results()["loss/model"] for n in numbers]

    learner, states = begin()
    first = steps(learner, 0)
    learner.update(Term([BATCH], forward, not_finite), step=1)
    for item in (learner, states):
        item.save(kept)
    bad_steps = learner.bad_steps_in_a_row
    unbroken = steps(learner, 2, 3)
    asked = [learner.infer([BATCH], forward)[0].tolist() for _ in range(2)]
    again, states = begin()
    for item in (again, states):
        item.load(kept)
    results = {
        "first": first,
        "bad_steps": [bad_steps, again.bad_steps_in_a_row],
        "unbroken": unbroken,
        "resumed": steps(again, 2, 3),
        "asked": asked,
    }
    (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resumed")
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.5)
    model: nn.Module = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "model")  # pyright: ignore[reportCallIssue]
    spawn(train, (str(folder / "model"), str(folder)), nprocs=1)
    return json.loads((folder / "results.json").read_text())


def test_17_a_resumed_run_drops_what_an_unbroken_one_drops(results: dict[str, Any]) -> None:
    assert results["resumed"] == results["unbroken"]
    assert results["first"][0] not in results["resumed"]


def test_17_bad_steps_in_a_row_are_counted_over_a_restart(results: dict[str, Any]) -> None:
    assert results["bad_steps"] == [1, 1]


def test_9_what_is_asked_drops_nothing(results: dict[str, Any]) -> None:
    once, again = results["asked"]
    assert once == again
