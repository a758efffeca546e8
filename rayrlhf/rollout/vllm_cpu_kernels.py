"""Kernels for vLLM's CPU worker: linear layers over packed weights, fused RMS norms, rotations of MLA.

vLLM itself packs the weights of a linear layer once, in place of the parameter. A push would not reach
them: a layer whose parameter is empty cannot be loaded or verified, and the head of a model with tied
embeddings is not processed again after a reload. Here the parameters stay as they are, and packed copies are
made from them after every load, when a layer is first used. Decoding 1 to 64 sequences spends most of its
time in these products; over packed weights they took 0.33 to 0.69 of the time for 1 to 48 rows, 0.81 for 64
(SmolLM2-135M in fp32, two AVX2 cores).

With `rounds`, factors of products are rounded to bf16, as in trainers on CPUs that have units for it
(rayrlhf.models.cpu_products), and so are outputs except the logits: half the bytes to read per token. A
rollout of 2,048 tokens took 3.8 s instead of 6.4 s (SmolLM2-135M, two cores with AMX). Activations stay fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm import _custom_ops
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

PACKED_FOR_ROWS = 32  # oneDNN chooses a layout for this number of rows, and uses it for any number


class PackedLinears:
    """The packed copies of a model's linear layers, each made when its layer is first used after a load."""

    def __init__(self, model: nn.Module, *, rounds: bool = False) -> None:
        """`rounds`: products in bf16; the process's precision must be that, too."""
        self.layers = list(_linear_layers(model))
        self.rounds = rounds

    def reset(self) -> int:
        """Free the copies; to be called before and after every load. Returns their bytes."""
        freed = 0
        for layer in self.layers:
            freed += getattr(layer.cpu_linear, "packed_bytes", 0)
            layer.cpu_linear = self._product_of(layer)
        return freed

    def _product_of(self, layer: Any) -> Any:
        rounds = self.rounds and layer.weight.dtype == torch.float32
        if rounds and isinstance(layer, VocabParallelEmbedding):
            return functional.linear  # a packed product would round the logits, too
        return _PackedLinear(torch.bfloat16 if rounds else layer.weight.dtype)


class _PackedLinear:
    """A layer's product with factors of `dtype`, in the place of vLLM's."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.handler: Any = None
        self.packed_bytes = 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.handler is None:
            factor = weight.detach().to(self.dtype)
            self.handler = _custom_ops.create_onednn_mm(factor.t(), PACKED_FOR_ROWS)
            self.packed_bytes = factor.nbytes
        if x.dtype == self.dtype:
            return _custom_ops.onednn_mm(self.handler, x, bias)
        y = _custom_ops.onednn_mm(self.handler, x.to(self.dtype), None).to(x.dtype)
        return y if bias is None else y.add_(bias)


def _linear_layers(model: nn.Module) -> Iterator[Any]:
    """Layers to which vLLM gives a product of their whole weight [out, in]."""
    for layer in model.modules():
        product, weight = getattr(layer, "cpu_linear", None), getattr(layer, "weight", None)
        # torch's own function: vLLM wants this layer's weights unpacked.
        if product not in (None, functional.linear) and isinstance(weight, Tensor) and weight.ndim == 2:
            yield layer


def keep_parameters() -> None:
    """Stop vLLM from replacing parameters by packed weights; before a model is loaded."""
    _custom_ops._supports_onednn = False


def fuse_norms() -> None:
    """Use vLLM's C kernels for RMS norms, which its CPU platform leaves to torch; before a model is made."""
    native = RMSNorm.forward_native

    def forward_cpu(self: RMSNorm, x: Tensor, residual: Tensor | None = None) -> Any:
        if self.variance_size_override is not None or not self.has_weight or x.dtype != self.weight.dtype:
            return native(self, x, residual)
        if residual is None:
            output = torch.empty(x.shape, dtype=x.dtype)
            torch.ops._C.rms_norm(output, x.contiguous(), self.weight.data, self.variance_epsilon)
            return output
        x, residual = x.contiguous(), residual.contiguous()
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
        return x, residual

    RMSNorm.forward_cpu = forward_cpu


def rotate_parts_by_torch() -> None:
    """Leave rotations of queries [T, heads, part], which are parts of wider ones as in MLA, to torch: vLLM's
    C kernel rotates other elements than these; before a model is made.
    """
    kernel = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if query.ndim > 2:
            return self.forward_native(positions, query, key)
        return kernel(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu
