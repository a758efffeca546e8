"""What is sent is what the checkpoint's files hold: names, layouts and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import LoraConfig
from rayrlhf.models.adapters import adapter_weights
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.models.lora import add_adapters
from tests.tiny_families import make_family


def loaded(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def sent(model: Any) -> dict[str, Tensor]:
    """Each as its spec says."""
    found: dict[str, Tensor] = {}
    for made_together in checkpoint_tensors(model):
        for spec, tensor in zip(made_together.specs, made_together.tensors(), strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
            assert spec.name not in found
            found[spec.name] = tensor
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "qwen2_moe"])
def test_17a_engines_are_sent_what_the_files_hold(family: str, tmp_path: Path) -> None:
    files = load_file(Path(make_family(tmp_path, family)) / "model.safetensors")
    tensors = sent(loaded(str(tmp_path)))
    assert tensors.keys() == files.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in files.items())


def test_17a_a_model_that_was_never_loaded_has_its_architectures_names(tmp_path: Path) -> None:
    model = loaded(make_family(tmp_path, "mixtral"))
    made = AutoModelForCausalLM.from_config(model.config)
    assert sent(made).keys() == sent(model).keys()


def test_17a_merged_adapters_with_experts(tmp_path: Path) -> None:
    """What is sent is what an export of the same model holds."""
    model = loaded(make_family(tmp_path, "mixtral"))
    before = sent(model)
    add_adapters(model, LoraConfig(rank=2, alpha=4, target_modules=["q_proj"]), seed=0)
    for _, parameter in adapter_weights(model):
        nn.init.normal_(parameter, std=0.1)
    after = sent(model)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_17a_partitioned_experts_are_laid_out_before_they_are_gathered(tmp_path: Path) -> None:
    """ZeRO-3 leaves an empty tensor in the place of each, with the shape of the whole in `ds_shape`."""
    model = loaded(make_family(tmp_path, "mixtral"))
    whole = [made_together.specs for made_together in checkpoint_tensors(model)]
    gathered = {parameter: parameter.data for parameter in model.parameters()}
    for parameter, data in gathered.items():
        parameter.ds_shape, parameter.data = data.shape, torch.empty(0)
    tensors = list(checkpoint_tensors(model))
    assert [made_together.specs for made_together in tensors] == whole
    [experts] = [t for t in tensors if t.weights[0].name == "model.layers.1.mlp.experts.gate_up_proj"]
    names = [spec.name.removeprefix("model.layers.1.block_sparse_moe.experts.") for spec in experts.specs]
    assert sorted(names) == sorted(f"{i}.{w}.weight" for i in range(4) for w in ("w1", "w3"))
    for part in experts.parts:
        part.data = gathered[part]
    w1, w3 = (experts.tensors()[names.index(f"2.{w}.weight")] for w in ("w1", "w3"))
    assert torch.equal(torch.cat([w1, w3]), experts.parts[0][2])


def test_saved_buffers_are_sent_and_others_not(tmp_path: Path) -> None:
    model = loaded(make_family(tmp_path, "llama"))
    mlp = model.model.layers[0].mlp
    mlp.register_buffer("balance", torch.arange(3.0))
    mlp.register_buffer("cache", torch.arange(3.0), persistent=False)
    tensors = sent(model)
    assert torch.equal(tensors["model.layers.0.mlp.balance"], torch.arange(3.0))
    assert not any(name.endswith("cache") for name in tensors)
