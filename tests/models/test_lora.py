"""Adapters on a frozen model: what they add, how they go and come, and what is written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rayrlhf.commands.merge_lora import main as merge_lora
from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import (
    TrainedAdapter,
    adapted_layers,
    adapter_weights,
    adapters_off,
    weights_of,
)
from rayrlhf.models.export import export_causal_lm, export_reward_model, export_step_model
from rayrlhf.models.heads import ScoreModel, StepModel
from rayrlhf.models.lora import add_adapters, check_targets
from tests.tiny_model import make_tokenizer

LORA = LoraConfig(rank=4, alpha=8)  # scaled by 2
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 8}
IDS = torch.arange(8, 20)[None]


def plain(tiny_model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def adapted(model: Any, lora: LoraConfig = LORA, *, trained: bool = True) -> Any:
    """With adapters that have been trained (random values here)."""
    add_adapters(model, lora, seed=0)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for _, parameter in adapter_weights(model):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_new_adapters_change_nothing_and_train_alone(tiny_model: str) -> None:
    model = plain(tiny_model)
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    adapted(model, trained=False)
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)
    assert [weight.name for weight in weights_of(model)] == names


def test_a_merged_weight_by_hand(tiny_model: str) -> None:
    base = plain(tiny_model).state_dict()
    model = adapted(plain(tiny_model))
    parameters = dict(adapter_weights(model))
    for name, merged in ((w.name, w.merged()) for w in weights_of(model)):
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in parameters:
            a, b = (parameters[f"{layer}.{matrix}.weight"].double() for matrix in ("lora_A", "lora_B"))
            assert a.shape[0] == b.shape[1] == 4
            torch.testing.assert_close(merged.double(), base[name].double() + 2 * b @ a, rtol=1e-6, atol=1e-6)
            assert not torch.equal(merged, base[name])
        else:
            assert torch.equal(merged, base[name])


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {weight.name: weight.merged() for weight in weights_of(model, remove_duplicate=False)}


def test_a_model_of_merged_weights_computes_the_same(tiny_model: str) -> None:
    model, merged = adapted(plain(tiny_model)), plain(tiny_model)
    merged.load_state_dict(whole(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2])
@torch.no_grad()
def test_7_merged_in_bf16_they_are_as_near_to_the_truth_as_the_trainer(size: float) -> None:
    """Of a small update both lose most: one rounds W + s B A, the other W x + s B A x. An engine that kept
    more of it would differ more from the trainer.
    """
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, num_hidden_layers=1, intermediate_size=64, vocab_size=8)
    model = adapted(LlamaForCausalLM(config).bfloat16(), trained=False)
    layer = adapted_layers(model)["model.layers.0.self_attn.q_proj"]
    nn.init.normal_(layer.lora_B["default"].weight, std=size)
    weights = {weight.name: weight for weight in weights_of(model)}
    merged = weights["model.layers.0.self_attn.q_proj.weight"].merged()
    a, b = (getattr(layer, matrix)["default"].weight.float() for matrix in ("lora_A", "lora_B"))
    x = torch.randn(256, 512).bfloat16()
    update = 2 * x.float() @ (b @ a).T
    base = x.float() @ layer.base_layer.weight.float().T
    trainer, engine = layer(x).float(), nn.functional.linear(x, merged).float()
    error_of_trainer, error_of_engine = ((y - base - update).norm() for y in (trainer, engine))
    assert error_of_engine == pytest.approx(error_of_trainer.item(), rel=0.03)
    start = layer.base_layer(x).float()
    kept_by_trainer, kept_by_engine = (
        ((y - start) * update).sum() / update.norm() ** 2 for y in (trainer, engine)
    )
    assert kept_by_engine == pytest.approx(kept_by_trainer.item(), abs=0.1)
    assert (kept_by_trainer < 0.2) == (size == 1e-5), "it is bf16 itself that loses it"


def test_7_a_merged_weight_is_rounded_once() -> None:
    model = adapted(LlamaForCausalLM(LlamaConfig(**SMALL)).bfloat16())
    layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
    a, b = (getattr(layer, matrix)["default"].weight.double() for matrix in ("lora_A", "lora_B"))
    exact = layer.base_layer.weight.double() + 2 * b @ a
    weights = {weight.name: weight for weight in weights_of(model)}
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"].merged(), exact.bfloat16())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_that_keep_their_weight_transposed_are_merged_too() -> None:
    config = GPT2Config(  # its layers are Conv1D
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config).eval()
    merged = GPT2LMHeadModel(config).eval()
    model = adapted(base)
    merged.load_state_dict(whole(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_adapters_go_and_come_back(tiny_model: str) -> None:
    start = logits(plain(tiny_model))
    model = adapted(plain(tiny_model))
    trained = logits(model)
    assert not torch.allclose(trained, start, atol=1e-2)
    with pytest.raises(RuntimeError, match="halfway"), adapters_off(model):
        assert torch.equal(logits(model), start)
        raise RuntimeError("halfway")
    assert torch.equal(logits(model), trained)
    assert sum(p.requires_grad for p in model.parameters()) == 28


def test_the_seed_alone_decides_where_adapters_start(tiny_model: str) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        model = plain(tiny_model)
        add_adapters(model, LORA, seed=seed)
        return [parameter.detach() for _, parameter in adapter_weights(model)]

    state = torch.get_rng_state()
    first = start(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, start(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, start(4), strict=True))


def test_only_the_named_layers_are_adapted(tiny_model: str) -> None:
    model = adapted(plain(tiny_model), LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_layers_that_take_no_adapter_are_refused(name: str, tiny_model: str) -> None:
    with pytest.raises(
        ValueError, match=rf"got {name}, wanted .*down_proj, gate_proj.* Fix: use the last parts"
    ):
        check_targets(plain(tiny_model), LoraConfig(target_modules=["k_proj", name]))


def files(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def trained(model: Any, base: str) -> TrainedAdapter:
    return TrainedAdapter(LORA, base, {name: p.detach().clone() for name, p in adapter_weights(model)})


def test_an_export_holds_the_merged_model_and_the_adapter_alone(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`merge-lora` makes the one of the other."""
    model = adapted(plain(tiny_model))
    export = tmp_path / "export"
    export_causal_lm(model, whole(model), make_tokenizer(), export, adapter=trained(model, tiny_model))
    loaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=5e-5)
    again = tmp_path / "again"
    assert merge_lora([str(export / "adapter"), str(again)]) == 0, capsys.readouterr().err
    assert files(again).keys() == files(export).keys()
    for name, tensor in files(export).items():
        torch.testing.assert_close(files(again)[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["reward", "steps"])
def test_a_classifiers_adapter_brings_its_head(
    kind: str, tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = adapted(plain(tiny_model).base_model)
    width = decoder.config.hidden_size
    head = nn.Linear(width, 1, bias=False) if kind == "reward" else nn.Linear(width, 2)
    model: Any = ScoreModel(decoder, head) if kind == "reward" else StepModel(decoder, head)
    export = tmp_path / "export"
    adapter = trained(model, tiny_model)
    if kind == "reward":
        export_reward_model(model, whole(model), make_tokenizer(), export, adapter=adapter)
    else:
        export_step_model(model, whole(model), make_tokenizer(), export, step_token="</s>", adapter=adapter)
    again = tmp_path / "again"
    assert merge_lora([str(export / "adapter"), str(again)]) == 0, capsys.readouterr().err
    assert files(again).keys() == files(export).keys()
    for name, tensor in files(export).items():
        torch.testing.assert_close(files(again)[name], tensor, rtol=1e-6, atol=1e-7)
