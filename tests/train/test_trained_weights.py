"""Checkpoints of weights alone: they come back to the bit, and training goes on as from a new start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.config.train import TrainConfig
from rayrlhf.train.deepspeed_engine import full_state_dict, gathered
from rayrlhf.train.learner import Learner, Term

pytestmark = pytest.mark.usefixtures("group")


def make(stage: int, dtype: torch.dtype, *, saves_optimizer: bool = False, frozen: bool = False) -> Learner:
    torch.manual_seed(stage)
    module = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    module[0].requires_grad_(not frozen)
    train = TrainConfig.model_validate({"num_steps": 9, "zero_stage": stage})
    return Learner(module, train, lr=1e-2, dtype=dtype, name="actor", saves_optimizer=saves_optimizer)


def steps(learner: Learner, count: int) -> None:
    dtype = next(learner.module.parameters()).dtype

    def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Metrics]:
        return (output - batch.sum()).square().sum(), Metrics()

    for step in range(count):
        rows: Any = torch.linspace(0, step + 1, 28, dtype=dtype).view(4, 7)
        learner.update(Term([rows], lambda engine, batch: engine(batch), loss), step=step)


def weights(learner: Learner) -> torch.Tensor:
    parameters = list(learner.module.parameters())
    with gathered(parameters):
        return torch.cat([each.detach().flatten().float() for each in parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_goes_on_from_the_weights(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    trained = make(stage, dtype)
    steps(trained, 3)
    trained.save(tmp_path)
    names = {path.name for path in (tmp_path / "actor").iterdir()}
    assert names == {"weights.safetensors", "layout.json"}
    again = make(stage, dtype)
    steps(again, 1)  # other weights and, in ZeRO, other master weights
    again.load(tmp_path)
    assert torch.equal(weights(again), weights(trained))

    anew = make(stage, dtype)  # whose moments are zero, as those after one step of `again` are not
    anew.load(tmp_path)
    fresh = make(stage, dtype)
    with torch.no_grad():
        state = full_state_dict(trained.module, on_this_rank=True)
    fresh.engine.destroy()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    module.load_state_dict(state)
    train = TrainConfig.model_validate({"num_steps": 9, "zero_stage": stage})
    fresh = Learner(module, train, lr=1e-2, dtype=dtype, name="actor")
    steps(anew, 2)
    steps(fresh, 2)
    assert torch.equal(weights(anew), weights(fresh))
    for learner in (trained, again, anew, fresh):
        learner.engine.destroy()


def test_a_checkpoint_with_states_is_read_by_a_run_that_saves_none(tmp_path: Path) -> None:
    trained = make(2, torch.float32, saves_optimizer=True)
    steps(trained, 2)
    trained.save(tmp_path)
    again = make(2, torch.float32)
    again.load(tmp_path)
    steps(trained, 1)
    steps(again, 1)
    assert torch.equal(weights(again), weights(trained)), "with its moments"
    trained.engine.destroy()
    again.engine.destroy()


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    trained = make(0, torch.float32)
    trained.save(tmp_path)
    other = make(0, torch.float32, frozen=True)
    with pytest.raises(ValueError, match=r"other parameters .* 2 differ, e.g. 0.bias"):
        other.load(tmp_path)
