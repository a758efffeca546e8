"""The moving average under DeepSpeed equals a float64 loop over the weights; training does not notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from rayrlhf.config.train import TrainConfig

NUM_STEPS = 4
WORLD_SIZE = 2
BETA = 0.7
ENGINES = ((0, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16"))

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def make_module() -> nn.Module:
    """A weight that ZeRO-3 lets go after use (over 100,000 numbers) and small, odd ones that it keeps."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(331, 331), nn.Tanh(), nn.Linear(331, 3, bias=False), nn.Linear(3, 3))
    module.get_parameter("3.bias").requires_grad_(False)
    return module


def train(arguments: dict[str, Any]) -> dict[Any, Any]:
    """On each worker: per engine the weights of every step, the averages, and what they left behind."""
    from rayrlhf.train import collectives
    from rayrlhf.train.deepspeed_engine import full_state_dict, make_engine
    from rayrlhf.train.ema import ExponentialMovingAverage

    torch.set_num_threads(1)

    def whole(engine: Any) -> dict[str, np.ndarray]:
        state = full_state_dict(engine.module, on_this_rank=collectives.rank() == 0)
        return {name: tensor.float().numpy() for name, tensor in state.items()}

    def run(stage: Any, dtype: str, *, averaged: bool) -> dict[str, Any]:
        config = TrainConfig(num_steps=NUM_STEPS, zero_stage=stage)
        engine = make_engine(make_module(), config, lr=1e-2, dtype=getattr(torch, dtype))
        ema = ExponentialMovingAverage(engine.module, BETA) if averaged else None
        inputs = torch.randn(8, 331, generator=torch.Generator().manual_seed(collectives.rank()))
        inputs = inputs.to(getattr(torch, dtype))
        trajectory, exports, outputs = [whole(engine)], [], []
        folder = Path(arguments["folder"]) / f"{stage}-{dtype}"
        for _ in range(NUM_STEPS):
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
            with torch.no_grad():
                outputs.append(engine(inputs).float().numpy())
            if ema is not None:
                ema.update()
                with ema.swapped():
                    exports.append(whole(engine))
                    with torch.no_grad():
                        engine(inputs)
                with torch.no_grad():
                    assert np.array_equal(engine(inputs).float().numpy(), outputs[-1])
            trajectory.append(whole(engine))
        if ema is not None:
            folder.mkdir(parents=True, exist_ok=True)
            ema.save(folder)
            torch.distributed.barrier()  # as a checkpoint is committed only when all ranks have saved
            restored = ExponentialMovingAverage(engine.module, BETA)
            restored.load(folder)
            with restored.swapped():
                exports.append(whole(engine))
        engine.destroy()
        return {"trajectory": trajectory, "exports": exports, "outputs": outputs}

    results = {
        (stage, dtype): (run(stage, dtype, averaged=True), run(stage, dtype, averaged=False))
        for stage, dtype in arguments["engines"]
    }
    return results if collectives.rank() == 0 else {}


def test_averages_under_deepspeed(tmp_path: Path) -> None:
    result = TorchTrainer(
        train,
        train_loop_config={"engines": ENGINES, "folder": str(tmp_path / "averages")},
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=WORLD_SIZE, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="ema", storage_path=str(tmp_path)),
    ).fit()
    assert result.return_value is not None
    for stage, dtype in ENGINES:
        averaged, plain = result.return_value[stage, dtype]
        case = f"ZeRO-{stage} in {dtype}"
        averages = {name: w.astype(np.float64) for name, w in averaged["trajectory"][0].items()}
        for step in range(NUM_STEPS):
            for name, weight in averaged["trajectory"][step + 1].items():
                averages[name] = BETA * averages[name] + (1 - BETA) * weight
                got = averaged["exports"][step][name]
                # An export in bfloat16 rounds to 8 significant bits.
                tolerance = 1e-6 if dtype == "float32" else 2**-8
                np.testing.assert_allclose(got, averages[name], rtol=tolerance, atol=1e-7, err_msg=case)
                if name != "3.bias":
                    assert not np.array_equal(got, weight), f"{case}: {name} was not swapped"
                # With averages kept and swapped in and out, training is the same bit for bit.
                assert np.array_equal(weight, plain["trajectory"][step + 1][name]), f"{case}: {name}"
        for name, saved in averaged["exports"][-1].items():
            assert np.array_equal(saved, averaged["exports"][-2][name]), f"{case}: {name} not restored"
        files = sorted(path.name for path in (tmp_path / "averages" / f"{stage}-{dtype}").iterdir())
        assert files == [f"ema-rank-{rank:04d}.pt" for rank in range(WORLD_SIZE if stage == 3 else 1)]
