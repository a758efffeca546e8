"""What autograd saves in a forward pass of mixtures of experts, beside the planner's bytes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.planner import SHAPES
from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.capacity.activations import Adapter, Precision, activations
from rayrlhf.capacity.model_shape import shape_of
from rayrlhf.config.model import LoraConfig
from rayrlhf.models.attention import VARLEN_SDPA, packed_inputs
from rayrlhf.models.lora import add_adapters

LENGTHS = [64] * 4
NUM_TOKENS = sum(LENGTHS)


SHORT = [("Mixtral", "LoRA and experts"), ("Qwen2-MoE", "all"), ("Qwen3-MoE", "LoRA")]


def cases() -> list[Any]:
    pairs = product(("Mixtral", "Qwen2-MoE", "Qwen3-MoE"), ("all", "LoRA", "LoRA and experts"))
    return [pytest.param(*pair, marks=[] if pair in SHORT else [pytest.mark.long]) for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("name, trained", cases())
def test_experts_keep_what_is_planned(name: str, trained: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation=VARLEN_SDPA, dtype=torch.float32
    )
    shape, adapter = shape_of(config.to_dict(), name), None
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    if trained != "all":
        has_experts = trained.endswith("experts")
        add_adapters(model, LoraConfig(rank=16, experts=has_experts), seed=0)
        adapter = Adapter(16, experts=has_experts)
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert learned == adapter.parameters(shape)
    kept = activations(shape, Precision(4, on_gpu=False), checkpointing=False, adapter=adapter)
    planned = kept.at_the_head(NUM_TOKENS) - NUM_TOKENS * kept.routed  # kept by the learner, not by autograd
    assert planned == pytest.approx(_saved_bytes(model.train()), rel=0.1)


def _saved_bytes(model: Any) -> int:
    """Of all storages that autograd saves, but for parameters, and of the last hidden state."""
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    input_ids = torch.randint(8, 1000, (NUM_TOKENS,))
    inputs = packed_inputs(input_ids, position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = model.base_model(**inputs).last_hidden_state
    save(hidden)
    return sum(saved.values())
