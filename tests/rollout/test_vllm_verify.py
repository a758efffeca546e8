"""What a verification finds, of arrivals and of what became of them; with a model that fuses and casts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayrlhf.rollout.vllm_verify import Arrivals, bit_sum
from rayrlhf.weights.checksum import checksum

TENSORS = {name: torch.randn(4, 6) for name in ("q", "k", "v", "norm")}


class Fused(nn.Module):
    """q, k and v in one parameter, permuted and padded with zeros as for a kernel; all in bfloat16."""

    def __init__(self, *, forgets: str = "") -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(16, 6, dtype=torch.bfloat16))
        self.norm = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
        self.forgets = forgets

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in tensors:
            parameter = "norm" if name == "norm" else "qkv"
            if name != self.forgets:
                rows = slice(0, 4) if name == "norm" else slice("qkv".index(name), 12, 3)
                getattr(self, parameter)[rows] = tensor.flip(1).to(torch.bfloat16)
            loaded.add(parameter)
        return loaded


def pushed(model: Any, **changed: Tensor) -> dict[str, str]:
    arrivals = Arrivals()
    assert arrivals.load(model, (TENSORS | changed).items()) == {"qkv", "norm"}
    wanted = {name: checksum(tensor) for name, tensor in TENSORS.items()}
    return arrivals.differences(model, wanted, is_sharded=False)


def test_fused_permuted_padded_and_rounded_tensors_are_the_trainers() -> None:
    assert pushed(Fused()) == {}


def test_a_tensor_with_other_values_or_another_name_is_named() -> None:
    other = TENSORS["k"].clone()
    other[2, 3] += 1e-7 + abs(other[2, 3]) * 1e-6
    assert pushed(Fused(), k=other) == {"k": "received with other values"}
    swapped = {"q": TENSORS["k"], "k": TENSORS["q"]}
    assert pushed(Fused(), **swapped).keys() == {"q", "k"}


def test_tensors_that_did_not_arrive_or_are_unknown_are_named() -> None:
    arrivals = Arrivals()
    arrivals.load(Fused(), [("q", TENSORS["q"]), ("norm", TENSORS["norm"])])
    wanted = {"q": checksum(TENSORS["q"]), "k": 7}
    assert arrivals.differences(Fused(), wanted, is_sharded=True) == {
        "k": "not received",
        "norm": "not the trainer's",
    }


@pytest.mark.parametrize(("forgotten", "named"), [("norm", {"norm"}), ("k", {"q", "k", "v"})])
def test_what_was_received_but_not_loaded_is_named(forgotten: str, named: set[str]) -> None:
    """With all tensors of its parameter, of which one sum is known."""
    wrong = pushed(Fused(forgets=forgotten))
    assert wrong.keys() == named
    parameter = "norm" if forgotten == "norm" else "qkv"
    assert set(wrong.values()) == {f"received, but {parameter} holds other values"}


def test_the_sum_of_bits_by_hand() -> None:
    assert bit_sum(torch.tensor([1.0, 0.0, -2.0])) == 0x3F800000 + (0xC0000000 - 2**32)
    assert bit_sum(torch.zeros(3, dtype=torch.bfloat16)) == 0
