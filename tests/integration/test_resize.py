"""A checkpoint of two workers is resumed with three and with one, with the results of an unchanged number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from rayrlhf.algorithms.metrics import Metrics
from rayrlhf.config.train import TrainConfig

# (ZeRO stage, dtype of the weights, of the masters, of sums of gradients)
VARIANTS = (
    (0, "float32", "float32", "weights"),
    (2, "bfloat16", "float32", "float32"),
    (1, "bfloat16", "bfloat16", "weights"),
    (3, "float32", "float32", "weights"),
)
SAVED_AFTER, NUM_STEPS = 3, 6
ROWS = 12  # of a step, over all ranks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_session")]


def train(arguments: dict[str, Any]) -> dict[Any, Any]:
    """Per variant the gradient norms of the last steps, the weights and their averages after them."""
    from rayrlhf.train import collectives
    from rayrlhf.train import frozen_checksums as frozen
    from rayrlhf.train.deepspeed_engine import full_state_dict
    from rayrlhf.train.ema import ExponentialMovingAverage
    from rayrlhf.train.learner import Learner, Term

    torch.set_num_threads(1)
    rank, world = collectives.rank(), collectives.world_size()

    def module() -> nn.Module:
        # A weight that ZeRO-3 lets go after use, and odd ones that no number of ranks divides.
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(331, 331), nn.Tanh(), nn.Linear(331, 3, bias=False), nn.Linear(3, 7))
        made[3].requires_grad_(False)  # as with adapters
        return made

    def run(variant: Any) -> dict[str, Any]:
        stage, name, masters, sums = variant
        dtype = getattr(torch, name)
        folder = Path(arguments["folder"]) / "-".join(map(str, variant))
        config = TrainConfig(
            num_steps=NUM_STEPS, zero_stage=stage, master_weights=masters, grad_accum_dtype=sums
        )
        learner = Learner(module().to(dtype), config, lr=1e-2, dtype=dtype, name="actor")
        average = ExponentialMovingAverage(learner.module, 0.7)
        start = 0
        if arguments["resume"]:
            start = SAVED_AFTER
            learner.load(folder)
            average.load(folder)
        norms: list[float] = []
        for step in range(start, NUM_STEPS):
            if step == SAVED_AFTER and not arguments["resume"]:
                folder.mkdir(parents=True, exist_ok=True)
                learner.save(folder)
                average.save(folder)
            rows = torch.randn(ROWS, 331, generator=torch.Generator().manual_seed(step)).to(dtype)
            mine: Any = rows.chunk(world)[rank]

            def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Metrics]:
                del batch
                return output.float().square().sum() / ROWS, Metrics()

            metrics = learner.update(Term([mine], lambda engine, batch: engine(batch), loss), step=step)
            average.update()
            norms.append(metrics.results()["loss/actor_grad_norm"])
        states = learner.engine.optimizer.optimizer.state if stage else {}
        moments = [s["exp_avg"].dtype for s in states.values()]
        assert not stage or set(moments) == {getattr(torch, masters)}
        found = {"norms": norms[SAVED_AFTER - start :], "weights": whole(learner.module)}
        found["frozen"] = frozen.bit_sums(learner.module)
        with average.swapped():
            found["averages"] = whole(learner.module)
        learner.engine.destroy()
        return found

    def whole(module: nn.Module) -> dict[str, np.ndarray]:
        state = full_state_dict(module, on_this_rank=rank == 0)
        return {name: tensor.float().numpy() for name, tensor in state.items()}

    return {variant: run(variant) for variant in VARIANTS}


def results(folder: Path, workers: int, *, resume: bool) -> dict[Any, Any]:
    result = TorchTrainer(
        train,
        train_loop_config={"folder": str(folder / "saved"), "resume": resume},
        torch_config=TorchConfig(backend="gloo", timeout_s=120),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"resize-{workers}", storage_path=str(folder)),
    ).fit()
    assert isinstance(result.return_value, dict)
    return result.return_value


def test_more_workers_and_fewer_go_on_where_the_others_stopped(tmp_path: Path) -> None:
    uninterrupted = results(tmp_path, 2, resume=False)
    for path in tmp_path.rglob("*model_states.pt"):
        saved = torch.load(path, weights_only=False)
        assert "3.bias" not in saved["module"] and not saved["frozen_param_fragments"], path
    for workers in (3, 1):
        resumed = results(tmp_path, workers, resume=True)
        for variant, wanted in uninterrupted.items():
            found, case = resumed[variant], f"{variant} with {workers} workers"
            # Gradients in bfloat16 add up in another order.
            tolerance = 1e-5 if variant[1] == "float32" else 2e-2
            assert found["frozen"] == wanted["frozen"] and len(wanted["frozen"]) == 2, case
            np.testing.assert_allclose(found["norms"], wanted["norms"], rtol=tolerance, err_msg=case)
            for kind in ("weights", "averages"):
                for name, tensor in wanted[kind].items():
                    np.testing.assert_allclose(
                        found[kind][name], tensor, rtol=tolerance, atol=tolerance, err_msg=f"{case}: {name}"
                    )
