"""SFT with the dropout of GPT-2: masks of ranks, and of a run that resumes from a checkpoint.

`tests/train/test_resumed_dropout.py` has the same for one learner, without Ray.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rayrlhf.supervised.driver import run_supervised
from tests.integration import supervised_data as made
from tests.integration.test_supervised import job
from tests.tiny_model import make_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("ray_session")]


def losses(config: Any) -> list[tuple[int, float]]:
    rows = map(json.loads, (Path(config.run.path) / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss/model"]) for row in rows if "loss/model" in row]


def test_17_a_resumed_run_drops_what_an_unbroken_one_drops(tmp_path: Path) -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=2, n_positions=128))
    model.save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    made.write(tmp_path / "train.jsonl", made.conversations(64))
    config = job(
        tmp_path,
        str(tmp_path / "gpt2"),
        "sft",
        data={"eval": []},
        train={"num_steps": 4, "num_workers": 2, "zero_stage": 1},
        checkpoint={"every_steps": 2, "keep": 2},
    )
    assert run_supervised(config) == 0
    run = Path(config.run.path)
    unbroken, weights = losses(config), load_file(run / "export" / "model.safetensors")
    assert [step for step, _ in unbroken] == [1, 2, 3, 4]
    states = sorted((run / "checkpoints" / "step_000002" / "random").iterdir())
    assert [file.name for file in states] == ["rank_0000.pt", "rank_0001.pt"]
    assert states[0].read_bytes() != states[1].read_bytes()

    shutil.rmtree(run / "checkpoints" / "step_000004")
    assert run_supervised(config) == 0
    again = losses(config)[-2:]
    assert again == unbroken[-2:]
    for name, tensor in load_file(run / "export" / "model.safetensors").items():
        assert tensor.equal(weights[name]), name
