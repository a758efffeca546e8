"""Adapted layers as one function equal PEFT's, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rayrlhf.config.model import LoraConfig
from rayrlhf.models import lora_linear
from rayrlhf.models.adapters import adapter_weights, adapters_off
from rayrlhf.models.lora import add_adapters
from rayrlhf.models.lora_linear import AdaptedProduct, FusedLinear
from rayrlhf.models.quiet_peft import LoraLinear

IDS = torch.arange(24).view(2, 12) % 50
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "attention_bias": True,
}


def adapted(*, dropout: float = 0.0) -> LlamaForCausalLM:
    """A model whose adapters matter: B is 0 at first, and so are biases."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    add_adapters(model, LoraConfig(rank=4, alpha=8, dropout=dropout), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def outcome(model: LlamaForCausalLM) -> dict[str, Tensor]:
    logits = model(IDS).logits
    logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in adapter_weights(model)}
    assert all(gradient is not None for gradient in gradients.values())
    return {"logits": logits.detach()} | {name: each for name, each in gradients.items() if each is not None}


def separate(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if type(module) is FusedLinear:
            setattr(module, "__class__", LoraLinear)  # noqa: B010  # the type is narrowed to what it was


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of `AdaptedProduct`, as they are computed."""
    results: list[Tensor] = []

    class Counted(AdaptedProduct):
        @classmethod
        def apply(cls, *arguments: Any) -> Tensor:
            results.append(AdaptedProduct.apply(*arguments))
            return results[-1]

    monkeypatch.setattr(lora_linear, "AdaptedProduct", Counted)
    return results


def test_outputs_and_gradients_equal_pefts(products: list[Tensor]) -> None:
    found = outcome(adapted())
    assert len(products) == 2 * 7, "every linear layer of both blocks"
    other = adapted()
    separate(other)
    wanted = outcome(other)
    assert len(products) == 2 * 7
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)

    def made(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=grad)

    weight, bias = made(6, 5, grad=False), made(6, grad=False)
    for given in (bias, None):
        arguments: Any = (made(7, 5), weight, given, made(3, 5), made(6, 3), 0.7)
        assert torch.autograd.gradcheck(AdaptedProduct.apply, arguments)


def test_without_adapters_a_layer_is_its_base(products: list[Tensor]) -> None:
    model = adapted()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    base.load_state_dict(
        {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }
    )
    with torch.no_grad(), adapters_off(model):
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    assert not products


def test_what_the_function_cannot_do_is_left_to_peft(products: list[Tensor]) -> None:
    dropping = adapted(dropout=0.5).train()
    assert not torch.equal(dropping(IDS).logits, dropping(IDS).logits)
    partitioned: Any = adapted()
    for parameter in partitioned.parameters():
        parameter.ds_id = 1  # DeepSpeed's mark of ZeRO-3
    partitioned(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        adapted()(IDS)
    mixed = adapted().bfloat16()
    for _, parameter in adapter_weights(mixed):
        parameter.data = parameter.data.float()
    mixed(IDS)
    assert not products
    dropping.eval()(IDS)
    assert products, "no dropout outside of training"
