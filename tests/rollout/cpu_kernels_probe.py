"""The products and norms of vLLM's CPU worker, over layers like vLLM's; prints one line of JSON.

In a process of its own: importing vLLM takes seconds and changes torch's settings.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """As vLLM leaves a layer after it has loaded its weights."""

    def __init__(self, product: Any, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight if weight is not None else nn.Parameter(torch.randn(48, 32))
        self.cpu_linear = product

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.cpu_linear(x, self.weight, bias)

    def error(self, rows: int) -> float:
        x, bias = torch.randn(rows, 32), torch.randn(48)
        return float((self(x, bias) - F.linear(x, self.weight, bias)).abs().max().detach())


def products() -> dict[str, Any]:
    from rayrlhf.rollout.vllm_cpu_kernels import PackedLinears

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    first, unused, unpacked = Linear(plain), Linear(plain), Linear(F.linear)
    tied = Linear(plain, first.weight)
    packed = PackedLinears(nn.ModuleList([first, unused, unpacked, tied]))
    before = packed.reset()
    errors = [layer.error(rows) for layer in (first, tied) for rows in (1, 5, 32, 70)]
    first.weight.mul_(-2)
    stale = tied.error(4)
    freed = packed.reset()
    return {
        "errors": errors,
        "stale": stale,
        "after": [first.error(4), tied.error(4)],
        "freed": [before, freed],
        "one": first.weight.nbytes,
        "unpacked stays": unpacked.cpu_linear is F.linear,
    }


def rounded() -> dict[str, Any] | None:
    """Layers whose factors are rounded to bf16; None on a CPU without units for that."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from rayrlhf.models.cpu_products import has_bf16_units
    from rayrlhf.rollout.vllm_cpu_kernels import PackedLinears

    if not has_bf16_units():
        return None

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("not replaced")

    layer = Linear(plain)
    head: Any = VocabParallelEmbedding.__new__(VocabParallelEmbedding)  # without vLLM's groups of ranks
    nn.Module.__init__(head)
    head.weight, head.cpu_linear = layer.weight, plain
    packed = PackedLinears(nn.ModuleList([layer, head]), rounds=True)
    packed.reset()
    x, bias = torch.randn(7, 32), torch.randn(48)
    y = layer(x, bias)
    wanted = F.linear(x.bfloat16().float(), layer.weight.bfloat16().float(), bias)
    error = float(((y - wanted).abs() / (wanted - bias).abs().clamp(min=1e-3)).max())
    return {
        "error": error,
        "dtype": str(y.dtype),
        "head": head.cpu_linear is F.linear,
        "halves": packed.reset() * 2 == layer.weight.nbytes,
    }


def norms() -> list[float]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    from rayrlhf.rollout.vllm_cpu_kernels import fuse_norms

    fuse_norms()
    x, residual = torch.randn(5, 3, 32).transpose(0, 1), torch.randn(3, 5, 32)
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(32, eps=1e-5)
        norm.weight.data.normal_()
        alone, wanted = norm.forward_cpu(x.clone()), norm.forward_native(x.clone())
        added = norm.forward_cpu(x.clone(), residual.clone())
        both = norm.forward_native(x.clone(), residual.clone())
    pairs = [(alone, wanted), *zip(added, both, strict=True)]
    return [float((one - other).abs().max()) for one, other in pairs]


def rotations() -> dict[str, float]:
    """Largest difference of our rotation, and of vLLM's kernel, from pairs turned as complex numbers."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from rayrlhf.rollout.vllm_cpu_kernels import rotate_parts_by_torch

    kernel = RotaryEmbedding.forward_cpu
    rotate_parts_by_torch()
    tokens, heads, other, part = 5, 4, 16, 64
    positions = torch.arange(tokens)
    query, key = torch.randn(tokens, heads, other + part), torch.randn(tokens, 1, part)
    angles = positions[:, None] / 10_000 ** (torch.arange(0, part, 2) / part)

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    wanted = turned(query[..., other:]), turned(key)
    found: dict[str, float] = {}
    with set_current_vllm_config(VllmConfig()):
        of_rope = {"rope_type": "default", "rope_theta": 10_000.0}
        rope = get_rope(
            part, max_position=64, rope_parameters=of_rope, is_neox_style=False, dtype=torch.float32
        )
        for name, rotate in (("ours", RotaryEmbedding.forward_cpu), ("kernel", kernel)):
            got: Any = rotate(rope, positions, query.clone()[..., other:], key.clone())
            found[name] = max(float((a - b.view_as(a)).abs().max()) for a, b in zip(wanted, got, strict=True))
        flat = torch.randn(tokens, heads * part)
        same = rope.forward_cpu(positions, flat.clone(), key.flatten(1).clone())[0]
        found["whole"] = float((turned(flat.view(tokens, heads, part)).flatten(1) - same).abs().max())
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        print(
            json.dumps(products() | {"rounded": rounded(), "norms": norms(), "rotations": rotations()}),
            flush=True,
        )
