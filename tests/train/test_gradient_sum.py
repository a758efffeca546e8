"""`train.grad_accum_dtype`: in bfloat16, 8 significant bits, a large sum swallows small addends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.batch import PackedBatch, cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.load import load_policy
from rayrlhf.models.logprobs import PolicyModel

if TYPE_CHECKING:
    from rayrlhf.train.learner import Loss

VARIANTS = {
    "2 weights": {"zero_stage": 2},
    "2 float32": {"zero_stage": 2, "grad_accum_dtype": "float32"},
    "3 float32": {"zero_stage": 3, "grad_accum_dtype": "float32", "offload_optimizer": True},
}
LARGE = 1024  # of whose gradient a bfloat16 keeps nothing under 1/512
TIMES = 64  # a small one is added
BATCH = PackedBatch(
    input_ids=torch.arange(8, 14),
    position_ids=position_ids_of([6]),
    cu_seqlens=cu_seqlens_of([6]),
    loss_mask=torch.tensor([0.0, 0, 1, 1, 1, 1]),
)


def load(path: str) -> PolicyModel:
    model = ModelConfig(path=path, dtype="bfloat16")
    return load_policy(model, path, device=torch.device("cpu"), chunk_tokens=64)


def forward(module: Any, batch: PackedBatch) -> torch.Tensor:
    return module(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask).logprobs


def loss(weight: float) -> Loss:
    return lambda logprobs, _: (-weight * logprobs.sum(), Metrics())


def norms(_: int, model_path: str, folder: str) -> None:
    """In a separate process: writes the norm of the sum of gradients, by variant."""
    from rayrlhf.train.learner import Learner, Term

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    found: dict[str, float] = {}
    for name, changes in VARIANTS.items():
        train = TrainConfig.model_validate({"num_steps": 1, "max_grad_norm": 0.0, **changes})
        learner = Learner(load(model_path), train, lr=0.0, dtype=torch.bfloat16, name="actor")
        large, small = Term([BATCH], forward, loss(LARGE)), Term([BATCH] * TIMES, forward, loss(1.0))
        metrics = learner.update(large, small, step=0)
        found[name] = metrics.results()["loss/actor_grad_norm"]
    (Path(folder) / "norms.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_many_micro_batches_add_up(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    spawn(norms, args=(tiny_model, str(tmp_path)), nprocs=1)
    found = json.loads((tmp_path / "norms.json").read_text())

    policy = load(tiny_model)
    loss(1.0)(forward(policy, BATCH), BATCH)[0].backward()
    gradients = [p.grad.float().norm() for p in policy.parameters() if p.grad is not None]
    exact = (LARGE + TIMES) * float(torch.stack(gradients).norm())
    assert found["2 float32"] == pytest.approx(exact, rel=1e-5)
    assert found["3 float32"] == pytest.approx(exact, rel=1e-5)
    assert found["2 weights"] == pytest.approx(exact * LARGE / (LARGE + TIMES), rel=1e-5)
