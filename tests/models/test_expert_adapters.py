"""Adapters of experts: what they add, that PEFT reads them, and that they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from rayrlhf.commands.merge_lora import main as merge_lora
from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import TrainedAdapter, adapter_weights, adapters_off, weights_of
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.lora import add_adapters
from tests.tiny_families import make_family
from tests.tiny_model import make_tokenizer

LORA = LoraConfig(rank=4, alpha=8, experts=True)
IDS = torch.arange(8, 40)[None]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_family(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def adapted(folder: str, *, trained: bool = True) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_adapters(model, LORA, seed=0)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for _, parameter in adapter_weights(model):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_new_ones_change_nothing_and_trained_ones_go_and_come_back(folder: str) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits(plain).detach()
    new = adapted(folder, trained=False)
    torch.testing.assert_close(logits(new), before, rtol=1e-5, atol=1e-5)
    names = {name for name, p in new.named_parameters() if p.requires_grad}
    assert len(names) == 2 * (4 + 2) * 2, "per layer: four linear layers and two stacks, A and B of each"
    assert [weight.name for weight in weights_of(new)] == [name for name, _ in plain.named_parameters()]
    model = adapted(folder)
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    with adapters_off(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    after.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in adapter_weights(model))


def test_an_expert_by_hand(folder: str) -> None:
    """The layer's output is Σ weight · expert with W + 2·B A in place of each W."""
    model = adapted(folder)
    experts = model.model.layers[1].mlp.experts
    hidden = torch.randn(5, experts.hidden_dim)
    chosen = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [2, 0]])
    weights = torch.rand(5, 2)
    merged = {weight.name: weight.merged() for weight in weights_of(model)}
    gate_up, down = (merged[f"model.layers.1.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj"))
    wanted = torch.zeros(5, experts.hidden_dim)
    for row in range(5):
        for expert, weight in zip(chosen[row], weights[row], strict=True):
            gate, up = (gate_up[expert] @ hidden[row]).chunk(2)
            wanted[row] += weight * (down[expert] @ (nn.functional.silu(gate) * up))
    torch.testing.assert_close(experts(hidden, chosen, weights), wanted, rtol=1e-4, atol=1e-4)
    layer = experts.adapters["gate_up_proj"]
    a, b = layer.lora_A["default"].weight[2], layer.lora_B["default"].weight[2]
    base = experts.gate_up_proj[2]
    torch.testing.assert_close(gate_up[2], base + 2.0 * b @ a)


def test_peft_and_merge_lora_read_the_export(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(folder)
    state = {name: p.detach().clone() for name, p in adapter_weights(model)}
    merged = {weight.name: weight.merged() for weight in weights_of(model)}
    export = tmp_path / "export"
    adapter = TrainedAdapter(LORA, folder, state)
    export_causal_lm(model, merged, make_tokenizer(), export, adapter=adapter)
    wanted = logits(model)
    whole = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    torch.testing.assert_close(logits(whole), wanted, rtol=1e-4, atol=1e-4)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, str(export / "adapter"))), wanted, rtol=1e-4, atol=1e-4
    )
    assert merge_lora([str(export / "adapter"), str(tmp_path / "again")]) == 0, capsys.readouterr().err
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)


def test_pushed_tensors_are_the_merged_experts(folder: str) -> None:
    """In the checkpoint's names, one tensor per expert."""
    model = adapted(folder)
    pushed = {
        spec.name: tensor
        for group in checkpoint_tensors(model)
        for spec, tensor in zip(group.specs, group.tensors(), strict=True)
    }
    fused = {weight.name: weight.merged() for weight in weights_of(model)}[
        "model.layers.0.mlp.experts.down_proj"
    ]
    names = [name for name in pushed if ".experts.3." in name and "layers.0" in name]
    assert len(names) == 3
    [down] = [
        name for name in names if pushed[name].shape == fused[3].shape and ("w2" in name or "down" in name)
    ]
    assert torch.equal(pushed[down], fused[3])


def test_models_without_experts_are_refused(tiny_model: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(
        ValueError, match="got true, wanted false: this model has no mixture-of-experts layers"
    ):
        add_adapters(model, LORA, seed=0)


def test_without_experts_attention_alone_is_adapted(folder: str) -> None:
    """PEFT itself would adapt experts and routers, too, by a copy of their weights in each forward pass."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_adapters(model, LoraConfig(rank=4), seed=0)
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name, _ in adapter_weights(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_names_that_peft_takes_for_experts_are_refused(folder: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"got down_proj, wanted .* model\.lora\.experts"):
        add_adapters(model, lora, seed=0)
