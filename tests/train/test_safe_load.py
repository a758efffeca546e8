"""Loading a checkpoint with a malicious pickle runs no code."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.config.train import TrainConfig
from rayrlhf.train import world_size as resize
from rayrlhf.train.deepspeed_engine import make_engine
from rayrlhf.train.ema import ExponentialMovingAverage
from rayrlhf.train.learner import Learner, Term
from rayrlhf.train.safe_load import FORCE, UnsafeCheckpoint, only_tensors

STAGES = (0, 2, 3)
FILES = {
    0: ["actor/engine/mp_rank_00_model_states.pt", "ema-rank-0000.pt"],
    2: [
        "actor/engine/mp_rank_00_model_states.pt",
        "actor/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "ema-rank-0000.pt",
    ],
    3: [
        "actor/engine/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "actor/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "ema-rank-0000.pt",
    ],
}


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


class Trained:
    """A learner and an average of its weights, after one step."""

    def __init__(self, stage: int) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        train = TrainConfig.model_validate({"num_steps": 3, "zero_stage": stage})
        self.learner = Learner(module, train, lr=1e-2, dtype=torch.float32, name="actor")
        self.average = ExponentialMovingAverage(self.learner.module, 0.5)

    def step(self) -> None:
        rows: Any = torch.ones(4, 7)

        def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Metrics]:
            del batch
            return output.square().sum(), Metrics()

        self.learner.update(Term([rows], lambda engine, batch: engine(batch), loss), step=0)
        self.average.update()

    def save(self, folder: Path) -> None:
        self.learner.save(folder)
        self.average.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)
        self.average.load(folder)


def plant(file: Path, proof: Path) -> None:
    content = torch.load(file, map_location="cpu", weights_only=False)
    torch.save(content | {"planted": Planted(proof)}, file)
    proof.unlink(missing_ok=True)


@pytest.mark.parametrize("stage", STAGES)
def test_20_a_planted_pickle_in_any_file_is_refused(stage: int, group: None, tmp_path: Path) -> None:
    """DeepSpeed's own way of opening each file runs what is planted in it, as a resume did; ours names the
    file and runs nothing. What is sound is loaded as before.
    """
    trained = Trained(stage)
    trained.step()
    saved, proof = tmp_path / "saved", tmp_path / "proof"
    saved.mkdir()
    trained.save(saved)
    assert sorted(str(path.relative_to(saved)) for path in saved.rglob("*.pt")) == FILES[stage]
    again = Trained(stage)
    again.load(saved)
    assert torch.equal(_flat(again), _flat(trained))
    for name in FILES[stage]:
        bad = tmp_path / "bad"
        shutil.copytree(saved, bad)
        plant(bad / name, proof)
        torch.load(bad / name, weights_only=False)
        assert proof.exists(), "what a resume did with this file"
        proof.unlink()
        with pytest.raises(UnsafeCheckpoint) as refused:
            again.load(bad)
        assert str(bad / name) in str(refused.value) and "it would call" in str(refused.value)
        assert ".system. None of it was run" in str(refused.value)
        assert not proof.exists()
        shutil.rmtree(bad)
    trained.learner.engine.destroy()
    again.learner.engine.destroy()


def _flat(trained: Trained) -> torch.Tensor:
    return torch.cat([average.flatten() for average in trained.average._averages.values()])


def test_20_a_bare_pickle_in_place_of_tensors_is_refused(tmp_path: Path) -> None:
    import pickle

    proof = tmp_path / "proof"
    (tmp_path / "states.pt").write_bytes(pickle.dumps(Planted(proof)))
    with pytest.raises(UnsafeCheckpoint, match=r"states\.pt: not a file of tensors"), only_tensors(tmp_path):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not proof.exists() and FORCE not in os.environ


def test_20_the_converter_for_another_number_of_workers_runs_nothing_either(
    group: None, tmp_path: Path
) -> None:
    """It opens the files in a separate process."""
    trained = Trained(2)
    trained.step()
    trained.learner.save(tmp_path)
    trained.learner.engine.destroy()
    shards, proof = tmp_path / "actor", tmp_path / "proof"
    resize._convert(shards / resize.TAG, tmp_path / "sound")
    assert (tmp_path / "sound" / resize.DONE).is_file(), (tmp_path / "sound" / resize.FAILED).read_text()
    plant(shards / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", proof)
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(shards / "engine"), "--output_folder", str(tmp_path / "old")]
    subprocess.run([resize.sys.executable, *command], capture_output=True, timeout=300, env=resize._env())
    assert proof.exists(), "what the converter did before"
    proof.unlink()
    resize._convert(shards / resize.TAG, tmp_path / "refused")
    assert "optim_states.pt: it would call" in (tmp_path / "refused" / resize.FAILED).read_text()
    assert not proof.exists()


def test_optimizers_states_of_bfloat16_are_read(group: None, tmp_path: Path) -> None:
    """The states that DeepSpeed saves with bfloat16 weights are in the list of allowed types."""
    torch.manual_seed(0)
    train = TrainConfig(num_steps=3, zero_stage=2)
    module = nn.Linear(7, 5, dtype=torch.bfloat16)
    engine: Any = make_engine(module, train, lr=1e-2, dtype=torch.bfloat16)
    engine.save_checkpoint(str(tmp_path), tag="engine", save_latest=False)
    with only_tensors(tmp_path):
        path, _ = engine.load_checkpoint(str(tmp_path), tag="engine")
    assert path is not None
    engine.destroy()
