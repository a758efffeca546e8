"""Weights leave the device and come back, with all that refers to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from rayrlhf.train.weight_offload import WeightOffload


def tied() -> Any:
    """Two layers with one weight, and a frozen one."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    module[1].weight = module[0].weight
    module[2].requires_grad_(False)
    return module


def flattened(module: nn.Module) -> Tensor:
    """As ZeRO 1 and 2 do: the trained weights become views of one buffer, which is returned."""
    trained = [p for p in module.parameters() if p.requires_grad]
    flat = _flatten_dense_tensors([p.data for p in trained])
    for parameter, view in zip(trained, _unflatten_dense_tensors(flat, trained), strict=True):
        parameter.data = view.data
    return flat


def test_plain_weights() -> None:
    module = tied()
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.ones(3, 4)
    before = module(x)
    weights = WeightOffload(module, pinned=False)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    assert weights.to_host() == sum(value.numel() * 4 for value in module.parameters())
    assert all(storage.nbytes() == 0 for storage in storages.values()), "given back"
    assert weights.to_host() == 0, "they are there already"
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())
    weights.to_device()
    weights.to_device()
    assert {p.untyped_storage().data_ptr() for p in module.parameters()} == {
        storage.data_ptr() for storage in storages.values()
    }
    assert torch.equal(module(x), before)
    assert module[1].weight is module[0].weight


def test_weights_of_a_flat_buffer_are_trained_on() -> None:
    """An optimizer that refers to the buffer changes what the module computes, before and after."""
    module = tied()
    flat = flattened(module)
    alias = flat[2:7]  # such as a partition
    kept = alias.clone()
    weights = WeightOffload(module, pinned=False)
    for turn in range(2):
        weights.to_host()
        assert flat.untyped_storage().nbytes() == 0 and module[0].weight.sum().isfinite()
        weights.to_device()
        assert torch.equal(alias, kept)
        flat.add_(1.0)
        kept = alias.clone()
        assert torch.equal(module[0].weight.flatten(), flat[: module[0].weight.numel()]), turn


def test_buffers_stay() -> None:
    """Pinning memory takes far longer than copying."""
    module = tied()
    weights = WeightOffload(module, pinned=False)
    places = []
    for _ in range(2):
        weights.to_host()
        places.append([p.data_ptr() for p in module.parameters()])
        weights.to_device()
    assert places[0] == places[1]


def test_what_is_written_on_the_host_comes_back() -> None:
    module = tied()
    weights = WeightOffload(module, pinned=False)
    weights.to_host()
    with torch.no_grad():
        module[2].bias.fill_(7.0)
    weights.to_device()
    assert module[2].bias.tolist() == [7.0, 7.0]


def test_gradients_after_a_turn() -> None:
    module = tied()
    weights = WeightOffload(module, pinned=False)
    x = torch.ones(3, 4)
    module(x).sum().backward()
    wanted = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    weights.to_host()
    weights.to_device()
    module(x).sum().backward()
    assert all(map(torch.equal, wanted, [p.grad for p in module.parameters() if p.grad is not None]))


def test_weights_on_memory_of_others() -> None:
    """Such as a mapped file's, which torch cannot give back."""
    module = tied()
    module[2].weight.data = torch.frombuffer(bytearray(32), dtype=torch.float32).view(2, 4)
    assert not module[2].weight.untyped_storage().resizable()
    weights = WeightOffload(module, pinned=False)
    weights.to_host()
    weights.to_device()
    assert module[2].weight.count_nonzero() == 0 and module[2].weight.untyped_storage().resizable()


def test_another_layout_is_noticed() -> None:
    module = tied()
    weights = WeightOffload(module, pinned=False)
    weights.to_host()
    weights.to_device()
    flattened(module)
    with pytest.raises(AssertionError, match="other storages"):
        weights.to_host()
