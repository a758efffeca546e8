"""The fused head against log-softmax over whole logits under plain autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayrlhf.models import fused_head
from rayrlhf.models.fused_head import FusedLogprobs, LogitScaling

TOKENS, HIDDEN, VOCABULARY = 17, 6, 29
SCALINGS = {
    "plain": LogitScaling(),
    "temperature": LogitScaling(temperature=0.7),
    "divisor": LogitScaling(divisor=3.0),
    "softcap": LogitScaling(softcap=2.0),
    "all": LogitScaling(divisor=0.5, softcap=1.5, temperature=1.3),
}


def inputs(dtype: torch.dtype, *, bias: bool = True, count: int = TOKENS) -> tuple[Any, Any, Any, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], which all want gradients, and targets [N]."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight, offset = leaf(count, HIDDEN), leaf(VOCABULARY, HIDDEN), leaf(VOCABULARY)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    return hidden, weight, offset if bias else None, targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: LogitScaling
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias) / scaling.divisor
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    log_probs = (logits / scaling.temperature).log_softmax(-1)  # [N, V]
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def upstream(count: int = TOKENS) -> Tensor:
    """A gradient for each logprob and each entropy, [2, N]."""
    return torch.randn(2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def backward(outputs: tuple[Tensor, Tensor], use: str = "both") -> None:
    weights = upstream(outputs[0].numel()).to(outputs[0].dtype)
    parts = {"logprobs": outputs[:1], "entropy": outputs[1:], "both": outputs}[use]
    chosen = {"logprobs": weights[:1], "entropy": weights[1:], "both": weights}[use]
    torch.stack([(g * output).sum() for g, output in zip(chosen, parts, strict=True)]).sum().backward()


def wanted(leaves: list[Tensor | None], targets: Tensor, scaling: LogitScaling, use: str = "both") -> Any:
    """Values and gradients of the same numbers in float64."""
    wide = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs: Any = plain(wide[0], wide[1], wide[2], targets, scaling)  # pyright: ignore[reportArgumentType]
    backward(outputs, use)
    return outputs, [None if leaf is None else leaf.grad for leaf in wide]


def relative_distance(got: Tensor, expected: Tensor) -> float:
    return float(((got.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("use", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_values_and_gradients(scaling: LogitScaling, chunk_tokens: int, bias: bool, use: str) -> None:
    *leaves, targets = inputs(torch.float32, bias=bias)
    outputs = FusedLogprobs.apply(*leaves, targets, scaling, chunk_tokens)
    backward(outputs, use)
    expected, gradients = wanted(leaves, targets, scaling, use)
    for got, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf is not None:
            assert gradient.norm() > 0.1
            assert relative_distance(leaf.grad, gradient) < 1e-5


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_finite_differences(scaling: LogitScaling) -> None:
    *leaves, targets = inputs(torch.float64, count=5)
    assert torch.autograd.gradcheck(lambda *x: FusedLogprobs.apply(*x, targets, scaling, 2), leaves)


def test_two_words() -> None:
    """Logits (0, ln 3): p = (1/4, 3/4), so d logp(1)/dz = (−1/4, 1/4) and dH/dz_1 = −p_1 (ln p_1 + H)."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logprobs, entropy = FusedLogprobs.apply(hidden, weight, None, torch.tensor([1]), LogitScaling(), 1)
    expected_entropy = math.log(4) - 0.75 * math.log(3)
    assert logprobs.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(expected_entropy)
    (of_logprob,) = torch.autograd.grad(logprobs, weight, retain_graph=True)
    assert of_logprob.squeeze().tolist() == pytest.approx([-0.25, 0.25])
    (of_entropy,) = torch.autograd.grad(entropy, weight)
    assert of_entropy[1].item() == pytest.approx(-0.75 * (math.log(0.75) + expected_entropy))


@given(count=st.integers(1, 20), chunk_tokens=st.integers(1, 25), name=st.sampled_from(sorted(SCALINGS)))
def test_any_chunking_gives_the_same_numbers(count: int, chunk_tokens: int, name: str) -> None:
    results = []
    for size in (chunk_tokens, count):
        *leaves, targets = inputs(torch.float64, count=count)
        outputs = FusedLogprobs.apply(*leaves, targets, SCALINGS[name], size)
        backward(outputs)
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_low_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 maths between products in the weights' dtype: off by no more than those round (2⁻⁸, 2⁻¹¹)."""
    monkeypatch.setattr(fused_head, "VOCABULARY_BLOCK", 10)  # 29 words: two whole blocks and a part
    *leaves, targets = inputs(dtype)
    outputs = FusedLogprobs.apply(*leaves, targets, SCALINGS[name], 7)
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    backward(outputs)
    expected, gradients = wanted(leaves, targets, SCALINGS[name])
    for got, value in zip(outputs, expected, strict=True):
        assert relative_distance(got, value) < 4 * torch.finfo(dtype).eps
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_distance(leaf.grad, gradient) < 4 * torch.finfo(dtype).eps


def test_the_weight_gradient_adds_up_in_fp32() -> None:
    """Chunk 1 brings 1, each of 256 more brings 2⁻⁹: a sum in bf16, whose step at 1 is 2⁻⁷, would stay at 1.

    One hidden unit and two words that are equally likely: d logp(0)/dw_0 of a row is hidden / 2.
    """
    hidden = torch.cat([torch.tensor([[2.0]]), torch.full((256, 1), 2.0**-8)]).bfloat16()
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = FusedLogprobs.apply(hidden, weight, None, torch.zeros(257).long(), LogitScaling(), 1)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.squeeze().tolist() == [1.5, -1.5]


def test_logits_that_would_overflow() -> None:
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    logprobs, entropy = FusedLogprobs.apply(hidden, weight, None, torch.tensor([0, 1]), LogitScaling(), 1)
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.squeeze().tolist() == [0.0, -2.0]
    assert weight.grad.squeeze().tolist() == [-1e4, 1e4]


def test_only_what_wants_a_gradient_gets_one() -> None:
    *leaves, targets = inputs(torch.float32)
    for kept in range(3):
        chosen = [leaf.detach().requires_grad_(index == kept) for index, leaf in enumerate(leaves)]
        backward(FusedLogprobs.apply(*chosen, targets, LogitScaling(), 7))
        assert [leaf.grad is not None for leaf in chosen] == [index == kept for index in range(3)]


def test_without_gradients_nothing_is_kept() -> None:
    *leaves, targets = inputs(torch.float32)
    with torch.no_grad():
        outputs = FusedLogprobs.apply(*leaves, targets, LogitScaling(), 7)
    assert all(output.grad_fn is None for output in outputs)


class NewStorages(TorchDispatchMode):
    """Counts the storages of exactly `num_bytes` that operations returned and that were not `known`."""

    def __init__(self, num_bytes: int, *known: Tensor) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.seen = {t.untyped_storage()._cdata: t for t in known}  # held, so that no address is used twice
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() == self.num_bytes:
                self.count += leaf.untyped_storage()._cdata not in self.seen
                self.seen[leaf.untyped_storage()._cdata] = leaf
        return result


@pytest.mark.parametrize("use", ["logprobs", "both"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_buffers_are_shared_by_all_chunks(name: str, use: str) -> None:
    chunk_tokens = 8  # 17 tokens: 3 chunks
    block, weight = 4 * chunk_tokens * VOCABULARY, 4 * VOCABULARY * HIDDEN
    *leaves, targets = inputs(torch.float32)
    with NewStorages(block) as blocks, NewStorages(block // 4) as spares:
        outputs = FusedLogprobs.apply(*leaves, targets, SCALINGS[name], chunk_tokens)
    assert blocks.count == spares.count == 1
    count = 1 if use == "logprobs" else 2
    kept, _ = outputs[0].grad_fn.kept
    with NewStorages(block, kept) as blocks, NewStorages(weight, leaves[1]) as weights:
        torch.autograd.grad(outputs[:count], leaves, list(upstream().float()[:count]))
    assert (blocks.count, weights.count) == (0, 1)


def test_logits_of_the_last_chunk_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of = []
    project = fused_head.project
    monkeypatch.setattr(
        fused_head,
        "project",
        lambda hidden, *rest, out: rows_of.append(len(hidden)) or project(hidden, *rest, out=out),
    )
    *leaves, targets = inputs(torch.float32)
    outputs = FusedLogprobs.apply(*leaves, targets, LogitScaling(), 7)
    assert rows_of == [3, 7, 7]
    first = torch.autograd.grad(outputs[0].sum(), leaves, retain_graph=True)
    assert rows_of[3:] == [7, 3]
    second = torch.autograd.grad(outputs[0].sum(), leaves)  # the kept logits are gone: all are computed
    assert rows_of[5:] == [7, 7, 3]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
