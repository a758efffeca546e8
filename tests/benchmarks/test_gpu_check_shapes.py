"""gpu-check's arithmetic, against torch's own count of operations, and where its allocator comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_check.batches import make_batch, make_policy
from benchmarks.gpu_check.shapes import llama, peak_tflops, update_flops
from benchmarks.gpu_check.step import Skip
from benchmarks.gpu_check.steps.cumem_pool import find_extension
from rayrlhf.models.attention import VARLEN_SDPA, packed_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", ["tiny", "tiny, untied"])
def test_flops_are_those_that_torch_counts(size: str) -> None:
    """Of transformers' own model with logits of all tokens: the products with weights. torch counts attention
    without the causal mask, so that part is left out.
    """
    lengths = [5, 8, 3]
    config = llama(size)
    policy = make_policy(size, VARLEN_SDPA, torch.float32, CPU, chunk=64)
    policy.causal_lm.gradient_checkpointing_disable()
    batch = make_batch(lengths, config.vocab_size, CPU)
    with FlopCounterMode(display=False) as counter:
        inputs = packed_inputs(batch.input_ids, batch.position_ids, batch.cu_seqlens)
        policy.causal_lm(**inputs).logits.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    of_products = sum(count for name, count in counted.items() if "attention" not in str(name))
    layers, hidden = config.num_hidden_layers, config.hidden_size
    of_attention = 3 * layers * sum(2 * hidden * length * (length + 1) for length in lengths)
    assert update_flops(config, lengths, sum(lengths)) - of_attention == of_products


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_device(device: str, tflops: float | None) -> None:
    assert peak_tflops(device) == tflops


def test_the_allocator_needs_vllm_for_cuda_or_its_source(tmp_path: Path) -> None:
    with pytest.raises(Skip, match="--cumem names no folder"):
        find_extension(None)
    with pytest.raises(Skip, match=r"has no cumem_allocator.cpp"):
        find_extension(tmp_path)
