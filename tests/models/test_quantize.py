"""Frozen weights in 4 bits: what is left of them, how gradients pass, what is saved and handed on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import LoraConfig, TrainedModelConfig
from rayrlhf.models.adapters import adapter_weights, adapters_off, weights_of
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.load import adapt, load_policy
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.train import frozen_checksums as frozen
from rayrlhf.weights.buckets import flatten, lay_out, unpack
from tests.tiny_model import make_tiny_model, make_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(8, 20)


def quantized(path: str) -> PolicyModel:
    """With adapters that have been trained (random values here)."""
    config = TrainedModelConfig(path=path, lora=LoraConfig(rank=4, alpha=8), quantization="nf4")
    policy = load_policy(config, path, device=CPU, chunk_tokens=64)
    adapt(config, policy.causal_lm, device=CPU, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapter_weights(policy):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return policy


def logprobs(policy: PolicyModel) -> torch.Tensor:
    one = torch.tensor([0, len(IDS)], dtype=torch.int32)
    return policy(IDS, torch.arange(len(IDS)), one, torch.ones(len(IDS))).logprobs


def whole(policy: PolicyModel) -> dict[str, torch.Tensor]:
    return {w.name: w.merged() for w in weights_of(policy.causal_lm, remove_duplicate=False)}


def test_all_layers_but_the_head_go_to_4_bits(tiny_model: str) -> None:
    policy = quantized(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    adapters = dict(adapter_weights(policy.causal_lm))
    for name, tensor in whole(policy).items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in adapters:
            assert torch.equal(tensor, base[name])
            continue
        a, b = (adapters[f"{layer}.{matrix}.weight"].detach() for matrix in ("lora_A", "lora_B"))
        kept = dequantize_4bit(*quantize_4bit(base[name], compress_statistics=True, quant_type="nf4"))
        torch.testing.assert_close(tensor, kept + 2 * b @ a)
        # 16 levels for normally distributed weights: about 9 % off, as a whole.
        assert 0.05 < (kept - base[name]).norm() / base[name].norm() < 0.12
    in_4_bits = [p for p in policy.parameters() if p.dtype == torch.uint8]
    assert len(in_4_bits) == 2 * 7 and not any(p.requires_grad for p in in_4_bits)


def test_17_a_dense_reference_is_another_model(tiny_model: str) -> None:
    """Why the config refuses one: KL > 0 before the first step. With its adapters off it is the same."""
    policy = quantized(tiny_model)
    with torch.no_grad():
        for _, parameter in adapter_weights(policy):
            if parameter.size(0) != 4:  # B, which begins at 0
                parameter.zero_()
        start = logprobs(policy)
        with adapters_off(policy):
            assert torch.equal(logprobs(policy), start)
        dense = load_policy(TrainedModelConfig(path=tiny_model), tiny_model, device=CPU, chunk_tokens=64)
        log_ratio = (logprobs(dense) - start)[1:]
    k3 = log_ratio.exp() - 1 - log_ratio
    assert k3.mean() > 0.01


def test_gradients_pass_also_after_an_evaluation(tiny_model: str) -> None:
    def gradients(policy: PolicyModel) -> list[torch.Tensor]:
        policy.zero_grad()
        logprobs(policy).sum().backward()
        found = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        assert len(found) == 28 and all(g.abs().sum() > 0 for g in found)
        return found

    policy = quantized(tiny_model)
    before = gradients(policy)
    with torch.no_grad():
        logprobs(policy.eval())
    for one, other in zip(before, gradients(policy.train()), strict=True):
        assert torch.equal(one, other)


def test_engines_get_dense_weights(tiny_model: str) -> None:
    policy = quantized(tiny_model)
    group = list(checkpoint_tensors(policy.causal_lm))
    slices = lay_out(group)
    received = dict(unpack(slices, flatten(group, slices)))
    start = load_file(Path(tiny_model) / "model.safetensors")
    for name, tensor in received.items():
        assert (tensor.shape, tensor.dtype) == (start[name].shape, torch.float32)
        assert torch.equal(tensor, whole(policy)[name])


def test_an_export_is_dense_and_computes_the_same(tmp_path: Path, tiny_model: str) -> None:
    policy = quantized(tiny_model)
    export_causal_lm(policy.causal_lm, whole(policy), make_tokenizer(), tmp_path / "export")
    plain = TrainedModelConfig(path=str(tmp_path / "export"))
    loaded = load_policy(plain, plain.path, device=CPU, chunk_tokens=64)
    torch.testing.assert_close(logprobs(loaded), logprobs(policy), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_goes_on_with_the_same_weights_only(tmp_path: Path, tiny_model: str) -> None:
    policy, again = quantized(tiny_model), quantized(tiny_model)
    with frozen.left_out(policy):
        state = policy.state_dict()
    assert state.keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
    for _, parameter in adapter_weights(again):
        torch.nn.init.zeros_(parameter)
    assert not torch.equal(logprobs(again), logprobs(policy))
    frozen.load(state, again)
    assert torch.equal(logprobs(again), logprobs(policy))
    frozen.check(frozen.bit_sums(policy), again)
    other = quantized(make_tiny_model(tmp_path / "other", seed=5))
    with pytest.raises(ValueError, match=r"got another frozen weight .* model\.path must be"):
        frozen.check(frozen.bit_sums(policy), other)
