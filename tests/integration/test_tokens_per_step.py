"""Steps given by tokens through the whole job: interrupted and resumed as in one go, for mean losses of every
kind.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.supervised.driver import run_supervised
from tests.integration import supervised_data as made
from tests.integration.supervised_runs import job
from tests.integration.test_supervised import logged

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_session")]

# 512 tokens are four micro-batches, two on each worker.
BY_TOKENS = {"samples_per_step": None, "tokens_per_step": 512, "max_tokens_per_micro_batch": 128}


def by_tokens(folder: Path, model: str, name: str, kind: str = "sft", **train: Any) -> Any:
    train = {"num_steps": None, "num_workers": 2, **BY_TOKENS, **train}
    return job(folder, model, kind, run={"name": name}, data={"max_tokens": 64}, train=train)


def test_an_interrupted_sft_run_has_the_losses_of_one_in_one_go(tmp_path: Path, tiny_model: str) -> None:
    made.write(tmp_path / "train.jsonl", made.conversations(96))
    made.write(tmp_path / "eval.jsonl", made.conversations(16, seed=1))
    whole = by_tokens(tmp_path, tiny_model, "whole", num_epochs=2)
    assert run_supervised(whole) == 0
    steps = len(logged(whole, "loss/model"))
    assert run_supervised(by_tokens(tmp_path, tiny_model, "halves", num_steps=steps // 2)) == 0
    halves = by_tokens(tmp_path, tiny_model, "halves", num_epochs=2)
    assert run_supervised(halves) == 0
    for key in ("loss/model", "data/samples", "data/tokens", "train/epoch"):
        assert logged(halves, key) == pytest.approx(logged(whole, key), rel=1e-5), key
    assert sum(logged(whole, "data/samples")) == 2 * 96
    assert logged(whole, "train/epoch")[-1] == 2.0
    assert min(logged(whole, "data/fill")[:-1]) > 0.93
    assert set(logged(whole, "data/micro_batches")[:-1]) == {2.0}
    assert set(logged(whole, "data/padding_fraction")[:-1]) == {0.0}
    assert logged(halves, "eval/loss")[-1] == pytest.approx(logged(whole, "eval/loss")[-1], rel=1e-5)
    assert run_supervised(by_tokens(tmp_path, tiny_model, "halves", tokens_per_step=256)) == 2  # refused


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("rm", made.pairs), ("dpo", made.pairs), ("kto", made.judged)],
)
def test_other_jobs_fill_the_micro_batches_that_they_train_on(
    tmp_path: Path, tiny_model: str, kind: str, rows: Any
) -> None:
    made.write(tmp_path / "train.jsonl", rows(96))
    made.write(tmp_path / "eval.jsonl", rows(16, seed=1))
    size = {"tokens_per_step": 1024, "max_tokens_per_micro_batch": 256, "num_epochs": 1}
    config = by_tokens(tmp_path, tiny_model, "whole", kind, **size)
    assert run_supervised(config) == 0
    assert sum(logged(config, "data/samples")) == 96
    assert logged(config, "train/epoch")[-1] == 1.0
    assert min(logged(config, "data/fill")[:-1]) > 0.9
    assert set(logged(config, "data/micro_batches")[:-1]) == {2.0}


def test_samples_exchanged_between_steps_are_the_same_after_a_resume(tmp_path: Path, tiny_model: str) -> None:
    rng = random.Random(0)
    rows = [{"prompt": "say k", "response": "k" * rng.randint(3, 36)} for _ in range(240)]
    made.write(tmp_path / "train.jsonl", rows)
    made.write(tmp_path / "eval.jsonl", rows[:16])

    def run(name: str, steps: int, fill: bool = True) -> list[float]:
        size = {"samples_per_step": 71, "tokens_per_step": None, "fill_micro_batches": fill}
        size["max_tokens_per_micro_batch"] = 256
        config = by_tokens(tmp_path, tiny_model, name, num_steps=steps, **size)
        assert run_supervised(config) == 0
        assert set(logged(config, "data/samples")) == {71.0}
        return logged(config, "loss/model")

    whole = run("whole", 5)
    run("halves", 2)
    assert run("halves", 5) == pytest.approx(whole, rel=1e-5)
    assert run("plain", 1, fill=False)[0] != pytest.approx(whole[0], rel=1e-5)
