"""Liger's kernels compute what transformers' modules do, and only where they are wanted.

They are Triton's. Its interpreter runs them on a CPU where triton and liger-kernel are installed (gpu.lock
has both): that shows the arithmetic, not what a GPU makes of it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.capacity.activations import Precision, layer_activation_bytes
from rayrlhf.capacity.model_shape import shape_of
from rayrlhf.config.model import LoraConfig, TrainedModelConfig
from rayrlhf.models import liger
from rayrlhf.models.liger import apply_liger, check_liger
from rayrlhf.models.load import adapt, load_policy
from rayrlhf.models.logprobs import PolicyModel
from tests.tiny_families import make_family

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_LIGER = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))
interpreted = pytest.mark.skipif(not HAS_LIGER, reason="needs liger-kernel and triton (gpu.lock)")


def policy_of(path: str, **settings: Any) -> PolicyModel:
    config = TrainedModelConfig(path=path, dtype="float32", **settings)
    policy = load_policy(config, path, device=CPU, chunk_tokens=64)
    return policy


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = AutoConfig.for_model("llama")
    with pytest.raises(ValueError, match="needs CUDA GPUs"):
        check_liger(llama, CPU)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package liger-kernel"):
        check_liger(llama, CUDA)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(liger, "_appliers", lambda: {"llama": print})
    check_liger(llama, CUDA)
    with pytest.raises(ValueError, match="Liger has no kernels for opt, but for llama"):
        check_liger(AutoConfig.for_model("opt"), CUDA)
    with pytest.raises(ValueError, match="not been tried with images"):
        check_liger(AutoConfig.for_model("qwen2_5_vl"), CUDA)


def test_a_refused_model_is_not_loaded(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="needs CUDA GPUs"):
        policy_of(make_family(tmp_path, "llama"), kernels="liger")


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A package of Liger's form, whose function for Llama replaces what Liger's does."""
    calls: list[dict[str, Any]] = []

    class Norm(torch.nn.Module):
        pass

    def rotation(query: Tensor, *_: Any) -> str:
        return "kernel"

    def apply(rope: bool = True, cross_entropy: bool = True, rms_norm: bool = True, swiglu: bool = True,
              model: Any = None) -> None:  # fmt: skip
        calls.append(dict(locals()))
        modeling_llama.LlamaRMSNorm = Norm  # pyright: ignore[reportAttributeAccessIssue]
        modeling_llama.apply_rotary_pos_emb = rotation  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", modeling_llama.LlamaRMSNorm)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    package: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield calls


def test_what_is_asked_of_liger(tmp_path: Any, imitation: list[dict[str, Any]]) -> None:
    """No losses; classes stay transformers' own, and the rotation is chosen by the device."""
    policy = policy_of(make_family(tmp_path, "llama"))
    norm, own = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    apply_liger(policy.causal_lm)
    assert [{k: v for k, v in call.items() if v is True or v is False} for call in imitation] == [
        {"rope": True, "cross_entropy": False, "rms_norm": True, "swiglu": True}
    ]
    assert imitation[0]["model"] is policy.causal_lm
    assert modeling_llama.LlamaRMSNorm is norm
    q, angles = torch.ones(1, 2, 3, 8), torch.ones(1, 3, 8)
    assert torch.equal(
        modeling_llama.apply_rotary_pos_emb(q, q, angles, angles)[0], own(q, q, angles, angles)[0]
    )
    on_device: Any = torch.empty(1, device="meta")
    liger.DEVICES = ("meta",)
    try:
        assert modeling_llama.apply_rotary_pos_emb(on_device) == "kernel"  # pyright: ignore[reportCallIssue]
    finally:
        liger.DEVICES = ("cuda",)


def test_what_is_planned() -> None:
    """Llama with H = 128, I = 256, in bf16: the norms keep 2 x 4 H fewer bytes, the MLP 2 I."""
    shape = shape_of(
        AutoConfig.for_model("llama", hidden_size=128, intermediate_size=256, num_attention_heads=4,
                             num_key_value_heads=2, num_hidden_layers=2, vocab_size=264).to_dict(), "tiny"
    )  # fmt: skip
    own, fused = (layer_activation_bytes(shape, Precision(2, True, liger=each)) for each in (False, True))
    assert own - fused == 2 * 4 * 128 + 2 * 256


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, which leaves floats as Python's, where a launch makes fp32 numbers of them, and has no
    functions of CUDA's libdevice.
    """
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    import liger_kernel.ops.rms_norm  # pyright: ignore[reportMissingImports]
    import numpy as np
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "family, lora", [("llama", None), ("qwen2", LoraConfig(rank=4)), ("qwen3", None), ("mixtral", None)]
)
def test_numbers(tmp_path: Any, interpreter: None, family: str, lora: LoraConfig | None) -> None:
    path = make_family(tmp_path, family)
    own = policy_of(path)
    names = list(own.state_dict())
    fused = policy_of(path, kernels="liger")
    assert list(fused.state_dict()) == names
    patched = [module for module in fused.modules() if "forward" in vars(module)]
    norms = sum("norm" in type(module).__name__.lower() for module in own.modules())
    mlps = sum(type(module).__name__.endswith("MLP") for module in own.modules())
    assert len(patched) == norms + (0 if family == "mixtral" else mlps)
    results = []
    for policy in (own, fused):
        config = TrainedModelConfig(path=path, lora=lora)
        adapt(config, policy.causal_lm, device=CPU, seed=0)
        lengths = [5, 3]
        ids = torch.randint(8, 264, (8,), generator=torch.Generator().manual_seed(0))
        policy.train()
        logprobs = policy(ids, position_ids_of(lengths), cu_seqlens_of(lengths), torch.ones(8)).logprobs
        logprobs.sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 2
    for found, wanted in zip(results[1], results[0], strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-3)


@interpreted
@pytest.mark.slow
def test_what_is_kept(tmp_path: Any, interpreter: None) -> None:
    """As planned: in fp32 two norms keep 4 H fewer elements of a layer, and the MLP I."""
    path, lengths = make_family(tmp_path, "llama"), [16, 16]
    kept = []
    for kernels in ("none", "liger"):
        policy = policy_of(path, kernels=kernels).train()
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        saved: dict[int, int] = {}

        def save(tensor: Tensor, weights: Any = weights, saved: Any = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.arange(8, 40)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            policy(ids, position_ids_of(lengths), cu_seqlens_of(lengths), torch.ones(32))
        kept.append(sum(saved.values()))
    layers, hidden, inner = 2, 128, 256
    planned = 32 * 4 * (layers * (2 * hidden + inner) + hidden)
    assert kept[0] - kept[1] == pytest.approx(planned, rel=0.05)
