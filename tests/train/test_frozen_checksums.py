"""What a checkpoint has of frozen weights: nothing but a sum of each, by which it knows them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayrlhf.train import frozen_checksums as frozen


def tied() -> Any:
    """A frozen embedding that is the output head too, and a layer between that is trained."""
    torch.manual_seed(0)
    made = nn.ModuleDict({"embed": nn.Embedding(5, 3), "layer": nn.Linear(3, 3)})
    made["head"] = nn.Linear(3, 5, bias=False)
    made["head"].weight = made["embed"].weight
    made["embed"].weight.requires_grad_(False)
    return made


def saved(module: nn.Module) -> dict[str, Tensor]:
    with frozen.left_out(module):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_only_what_is_trained_is_saved() -> None:
    module = tied()
    assert saved(module).keys() == {"layer.weight", "layer.bias"}
    assert module.state_dict().keys() == {"embed.weight", "head.weight", "layer.weight", "layer.bias"}


def test_what_is_saved_comes_back() -> None:
    module, other = tied(), tied()
    nn.init.zeros_(other["layer"].weight)
    frozen.load(saved(module), other)
    assert torch.equal(other["layer"].weight, module["layer"].weight)


def test_another_module_is_refused() -> None:
    state = saved(tied())
    with pytest.raises(RuntimeError, match=r"unexpected \['more'\]"):
        frozen.load({**state, "more": torch.ones(1)}, tied())
    del state["layer.bias"]
    with pytest.raises(RuntimeError, match=r"missing \['layer.bias'\]"):
        frozen.load(state, tied())


def test_sums_are_of_bits() -> None:
    module = nn.Linear(2, 1).requires_grad_(False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
        module.bias.copy_(torch.tensor([-0.0]))
    # IEEE 754: 1.0 is 0x3f800000, 2.0 is 0x40000000, -0.0 is the lowest integer.
    assert frozen.bit_sums(module) == {"weight": 0x3F800000 + 0x40000000, "bias": -(2**31)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_sum_is_that_of_the_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).mul(40).to(dtype)
    module = nn.Module()
    module.weight = nn.Parameter(weight.t(), requires_grad=False)  # which is not contiguous
    whole = frozen.bit_sums(module)
    monkeypatch.setattr(frozen, "PIECE", 5)
    assert frozen.bit_sums(module) == whole


def test_another_frozen_weight_is_named() -> None:
    module, other = tied(), tied()
    sums = frozen.bit_sums(module)
    assert sums.keys() == {"embed.weight"}
    frozen.check(sums, other)
    with torch.no_grad():
        other["embed"].weight[3, 1] += 1e-3
    with pytest.raises(ValueError, match=r"embed\.weight: got another .* \(1 of 1 differ\)"):
        frozen.check(sums, other)
    frozen.check({}, other)  # a checkpoint in which nothing was frozen
