"""The moving average of weights in one process: by hand, exact restoring, and what a checkpoint must fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rayrlhf.train.collectives import Ranks
from rayrlhf.train.ema import ExponentialMovingAverage


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear layers with the same weight, [[1, 2]], and biases 0 and 4; the last bias is frozen."""
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    second.weight = first.weight
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0]]))
        first.bias.fill_(0.0)
        second.bias.fill_(4.0)
    second.bias.requires_grad_(False)
    return nn.Sequential(first, second).to(dtype)


def step(module: nn.Module, change: float) -> None:
    """Add `change` to every trainable weight."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += change


def weights_of(module: nn.Module) -> dict[str, list[float]]:
    return {name: p.detach().flatten().tolist() for name, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand(dtype: torch.dtype) -> None:
    module = tiny(dtype)
    ema = ExponentialMovingAverage(module, beta=0.75)
    step(module, 4.0)  # weights 5, 6; bias 4
    ema.update()  # 0.75 · (1, 2) + 0.25 · (5, 6) = 2, 3; 0.75 · 0 + 0.25 · 4 = 1
    step(module, -8.0)  # weights -3, -2; bias -4
    ema.update()  # 0.75 · (2, 3) + 0.25 · (-3, -2) = 0.75, 1.75; 0.75 - 1 = -0.25
    with ema.swapped():
        assert weights_of(module) == {"0.weight": [0.75, 1.75], "0.bias": [-0.25], "1.bias": [4.0]}
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module.get_parameter("1.weight") is module.get_parameter("0.weight")  # still tied
    assert weights_of(module) == {"0.weight": [-3.0, -2.0], "0.bias": [-4.0], "1.bias": [4.0]}


def test_sums_smaller_than_the_weights_precision_are_not_lost() -> None:
    # bfloat16 has 8 significant bits: between 1 and 2 the next number is 2^-7 away. With β = 0.999 a single
    # step from 1 to 1.5 moves the average by 0.0005, and 1000 of them by (1 - 0.999^1000)/2 = 0.31615.
    module = tiny(torch.bfloat16)
    ema = ExponentialMovingAverage(module, beta=0.999)
    step(module, 0.5)
    for _ in range(1000):
        ema.update()
    with ema.swapped():
        assert module.get_parameter("0.weight")[0, 0].item() == pytest.approx(1.31615, abs=2**-8)


@settings(max_examples=40, derandomize=True)
@given(
    beta=st.floats(0.01, 0.999),
    num_steps=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_a_float64_loop_and_restores_every_bit(beta: float, num_steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    module = tiny(torch.bfloat16 if seed % 2 else torch.float32)
    ema = ExponentialMovingAverage(module, beta=beta)
    weight = module.get_parameter("0.weight")
    seen = [weight.detach().double().numpy().copy()]
    for _ in range(num_steps):
        step(module, rng.normal())
        seen.append(weight.detach().double().numpy().copy())
        ema.update()
    # Unrolled: β^n·w_0 + (1-β)·Σ_i β^(n-i)·w_i.
    expected = beta**num_steps * seen[0] + (1 - beta) * sum(
        beta ** (num_steps - i) * w for i, w in enumerate(seen) if i > 0
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with ema.swapped():
        # Cast to bfloat16, the average is off by up to 2^-8 of itself.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[weight.dtype]
        np.testing.assert_allclose(
            weight.detach().double(), expected, rtol=tolerance, atol=1e-5 + tolerance * 1e-2
        )
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


def test_an_exception_inside_restores_too() -> None:
    module = tiny()
    ema = ExponentialMovingAverage(module, beta=0.5)
    step(module, 0.1)
    before = weights_of(module)
    with pytest.raises(RuntimeError, match="disk full"), ema.swapped():
        assert weights_of(module) != before
        raise RuntimeError("disk full")
    assert weights_of(module) == before


def test_what_is_kept_is_a_copy_in_fp32_without_frozen_or_tied_doubles(tmp_path: Path) -> None:
    module = tiny(torch.bfloat16)
    ExponentialMovingAverage(module, beta=0.5).save(tmp_path)
    saved = torch.load(tmp_path / "ema-rank-0000.pt", weights_only=True)
    assert {name: tensor.dtype for name, tensor in saved.items()} == {
        "0.weight": torch.float32,
        "0.bias": torch.float32,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    module = tiny(dtype)
    ema = ExponentialMovingAverage(module, beta=0.9)
    step(module, 1 / 3)
    ema.update()
    ema.save(tmp_path)

    resumed = tiny(dtype)
    step(resumed, 1 / 3)
    restored = ExponentialMovingAverage(resumed, beta=0.9)
    restored.load(tmp_path)
    for one, average in ((module, ema), (resumed, restored)):
        step(one, -0.7)
        average.update()
    with ema.swapped(), restored.swapped():
        assert weights_of(resumed) == weights_of(module)


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no ema-rank-0000\.pt in .*algorithm\.ema_beta"):
        ExponentialMovingAverage(tiny(), beta=0.5).load(tmp_path)
    ExponentialMovingAverage(nn.Sequential(nn.Linear(3, 1)), beta=0.5).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"1 parameters differ, e\.g\. 0\.weight is \(1, 3\) there and \(1, 2\) here"
    ):
        ExponentialMovingAverage(tiny(), beta=0.5).load(tmp_path)


class SecondOfTwo(Ranks):
    @property
    def rank(self) -> int:
        return 1

    @property
    def world_size(self) -> int:
        return 2


def test_other_ranks_keep_nothing(tmp_path: Path) -> None:
    module = tiny()
    ema = ExponentialMovingAverage(module, beta=0.5, ranks=SecondOfTwo())
    step(module, 1.0)
    ema.update()
    before = weights_of(module)
    with ema.swapped():
        assert weights_of(module) == before
    ema.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    ema.load(tmp_path)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_beta_must_keep_and_move(beta: float) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        ExponentialMovingAverage(tiny(), beta=beta)
