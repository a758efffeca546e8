"""Products of fp32 matrices in bf16: measured, chosen where they are faster, and how far they are off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models import cpu_products, load, probe
from rayrlhf.models.attention import packed_inputs, varlen_sdpa
from rayrlhf.models.cpu_products import (
    CastLinear,
    cast_linear_layers,
    casts_factors,
    exactly,
    has_bf16_units,
    products_in,
    use_fastest_products,
)
from rayrlhf.models.fused_head import FusedLogprobs, LogitScaling
from rayrlhf.models.lora_linear import AdaptedProduct

CONFIG = LlamaConfig(hidden_size=256, intermediate_size=384)


def precision() -> str:
    backend: Any = torch.backends.mkldnn
    return backend.matmul.fp32_precision


@pytest.fixture(autouse=True)
def precision_is_restored() -> Iterator[None]:
    cpu_products.measure_products.cache_clear()
    with products_in(precision()):
        yield
    cpu_products.measure_products.cache_clear()


def pretend_units(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, *, onednn_rounds: bool = True
) -> None:
    """A CPU that multiplies in fp32 in one second, and factors that were rounded to bf16 in so many; another
    process delays it the first two times.
    """
    delays = iter([1.0, 1.0])

    def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
        is_rounded = call.__name__ == "layer_with_casts" or precision() == "bf16"
        return call(), (bf16_seconds if is_rounded else 1.0) + next(delays, 0.0)

    @contextmanager
    def products(name: str) -> Iterator[None]:
        with products_in(name), Rounded() if onednn_rounds and name == "bf16" else nullcontext():
            yield

    monkeypatch.setattr(cpu_products, "has_bf16_units", lambda: True)
    monkeypatch.setattr(cpu_products, "products_in", products)
    monkeypatch.setattr(cpu_products, "_timed", timed)


class Rounded(torch.overrides.TorchFunctionMode):
    """Rounds the factors of `@` to bf16, as oneDNN does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.matmul or function is Tensor.__matmul__:
            args = tuple(each.bfloat16().float() for each in args)
        return function(*args, **(kwargs or {}))


def test_faster_products_are_chosen_and_their_deviation_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_units(monkeypatch, bf16_seconds=0.25)
    products = use_fastest_products(CONFIG, rows=256)
    assert products.bf16 and not products.casts and precision() == "bf16" and not casts_factors()
    assert products.speedup == 4.0
    # Numbers in [1, 2) are rounded to multiples of 2^-7: the error is 2^-8 / sqrt(3) in the mean square, and
    # 0.73 of that relative to numbers spread evenly over their logarithm; both factors are rounded.
    assert products.deviation == pytest.approx(2**0.5 * 2**-8 / 3**0.5 * 0.73, rel=0.1)
    assert "4.0 x as fast as fp32" in str(products) and "model.dtype=float32" in str(products)


def test_casts_where_onednn_does_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_units(monkeypatch, bf16_seconds=0.5, onednn_rounds=False)
    products = use_fastest_products(CONFIG, rows=256)
    assert products.bf16 and products.casts and casts_factors()
    assert products.speedup == 2.0
    assert products.deviation == pytest.approx(3**0.5 * 2**-8 / 3**0.5 * 0.73, rel=0.1), "and the result"
    assert "by casts: 2.0 x as fast as fp32" in str(products)


def test_products_that_are_hardly_faster_stay_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_units(monkeypatch, bf16_seconds=0.8)
    before = precision()
    products = use_fastest_products(CONFIG, rows=256)
    assert not products.bf16 and not products.casts
    assert precision() == before and not casts_factors()


def test_without_units_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_units(monkeypatch, bf16_seconds=0.1)
    monkeypatch.setattr(cpu_products, "has_bf16_units", lambda: False)
    before = precision()
    assert not use_fastest_products(CONFIG).bf16
    assert precision() == before


def test_small_models_stay_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_units(monkeypatch, bf16_seconds=0.1)
    assert not use_fastest_products(LlamaConfig(hidden_size=64, intermediate_size=4096)).bf16


def test_only_auto_on_a_cpu_may_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    CONFIG.save_pretrained(tmp_path)
    pretend_units(monkeypatch, bf16_seconds=0.1)
    path = f"{tmp_path}"
    before = precision()
    for dtype in ("float32", "bfloat16"):
        assert load.choose_products(ModelConfig(path=path, dtype=dtype), path, torch.device("cpu")) is None
    assert load.choose_products(ModelConfig(path=path), path, torch.device("cuda")) is None
    assert precision() == before
    products = load.choose_products(ModelConfig(path=path), path, torch.device("cpu"))
    assert products is not None and products.bf16 and precision() == "bf16"


def assert_off_by_roundings(found: list[Any], wanted: list[Any], *, least: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert least < float((one - other).detach().std() / other.detach().std()) < 0.01


@pytest.mark.skipif(not has_bf16_units(), reason="this CPU has no bf16 units")
def test_this_cpus_products_are_off_by_a_rounding_at_most() -> None:
    """With AVX512-BF16 alone, oneDNN rounds nothing."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 512, requires_grad=True), torch.randn(384, 512, requires_grad=True)
    exact = x @ weight.t()
    wanted = torch.autograd.grad(exact.square().sum(), (x, weight))
    with products_in("bf16"):
        rounded = x @ weight.t()
        found = torch.autograd.grad(rounded.square().sum(), (x, weight))
    assert_off_by_roundings([rounded, *found], [exact, *wanted], least=0.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_cast_layer_is_the_layer_with_rounded_factors(bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 96, bias=bias)
    if frozen:
        layer.weight.requires_grad_(False)
    x = torch.randn(2, 64, 128, requires_grad=True)
    wanted_of = [x, *(each for each in layer.parameters() if each.requires_grad)]

    def results() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), wanted_of)]

    exact = results()
    cast_linear_layers(layer)
    assert all(map(torch.equal, results(), exact)), "until the process casts"
    with products_in("bf16", casts=True):
        rounded = results()
        assert_off_by_roundings(rounded, exact, least=0.001)
        bf16 = [each.bfloat16() for each in (x, layer.weight)]
        expected = (bf16[0] @ bf16[1].t()).float()
        torch.testing.assert_close(rounded[0], expected if layer.bias is None else expected + layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), rounded[0])
        halves = layer.to(torch.float64)(x.double())
        assert halves.dtype == torch.float64
        layer.float()
        with products_in("ieee"):
            assert all(map(torch.equal, results(), exact))


def test_narrow_layers_and_other_kinds_stay() -> None:
    model = torch.nn.ModuleList(
        [torch.nn.Linear(64, 64), torch.nn.Linear(64, 1), torch.nn.Bilinear(64, 64, 64)]
    )
    cast_linear_layers(model)
    assert [type(each) for each in model] == [CastLinear, torch.nn.Linear, torch.nn.Bilinear]


def test_the_heads_gradients_by_casts() -> None:
    """The log-probabilities stay exact. Neither the rows nor the vocabulary are multiples of a block."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64, requires_grad=True), torch.randn(5000, 64, requires_grad=True)
    targets = torch.randint(0, 5000, (50,))

    def results() -> list[Tensor]:
        logprobs, entropy = FusedLogprobs.apply(hidden, weight, None, targets, LogitScaling(), 20)
        grads = torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))
        return [logprobs, entropy, *grads]

    exact = results()
    with products_in("ieee", casts=True):
        found = results()
    assert all(map(torch.equal, found[:2], exact[:2]))
    assert_off_by_roundings(found[2:], exact[2:], least=0.0005)


@pytest.mark.parametrize("bias", [True, False])
def test_adapted_layers_by_casts(bias: bool) -> None:
    """The product with the frozen weight is rounded, those of the adapter are not."""
    torch.manual_seed(0)
    x, a, b = (torch.randn(size, requires_grad=True) for size in [(32, 128), (4, 128), (96, 4)])
    weight, offset = torch.randn(96, 128), torch.randn(96) if bias else None

    def results() -> list[Tensor]:
        y = AdaptedProduct.apply(x, weight, offset, a, b, 0.5)
        return [y, *torch.autograd.grad(y.sum(), (x, a, b))]

    exact = results()
    with products_in("ieee", casts=True):
        found = results()
    assert_off_by_roundings(found[:2], exact[:2], least=0.0005)
    assert all(map(torch.equal, found[2:], exact[2:])), "sums of y do not depend on W x"


class Recorded(torch.autograd.Function):
    """2 x; notes how each pass multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noted: list[str]) -> Tensor:
        noted.append(precision())
        ctx.noted = noted
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.noted.append(precision())
        return 2 * grad, None


@pytest.mark.parametrize("around", ["bf16", "ieee"])
def test_exactly_is_the_call_itself_in_fp32(around: str) -> None:
    """(2 x) y + x with x = 3, y = 5: 33, and the derivatives 2 y + 1 and 2 x; z takes no part."""
    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    frozen, noted = torch.tensor(1.0), []
    with products_in(around):
        found = exactly(lambda a, b, c: Recorded.apply(a, noted) * b + a * c, x, y, frozen)
        found.backward()
        assert precision() == around
    assert (found.item(), x.grad, y.grad) == (33.0, 11.0, 6.0)
    assert noted == ["ieee", "ieee"] and frozen.grad is None


def test_exactly_without_gradients() -> None:
    with products_in("bf16"), torch.no_grad():
        found = exactly(lambda a: a * 2, torch.ones(2, requires_grad=True))
    assert found.tolist() == [2, 2] and not found.requires_grad


def test_attention_is_computed_in_fp32() -> None:
    lengths = [5, 3]
    inputs = packed_inputs(torch.zeros(8), position_ids_of(lengths), cu_seqlens_of(lengths))
    found = []
    for precision_of_layers in ("ieee", "bf16"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 4, 4))
        with products_in(precision_of_layers):
            output, _ = varlen_sdpa(torch.nn.Module(), q, k, v, **inputs)
            output.square().sum().backward()
        found.append([output, q.grad, k.grad, v.grad])
    for exact, other in zip(*found, strict=True):
        assert torch.equal(exact, other)


def test_the_probe_compares_fp32_with_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that rounds factors took every model for one that needs a stream per sequence."""
    monkeypatch.setattr(probe, "_known", {})
    monkeypatch.setattr(probe, "_judge", lambda *_: precision())
    with products_in("bf16"):
        assert probe.verdict_of(CONFIG, longest=10) == "ieee"


@pytest.mark.parametrize("where", ["inside", "around"])
def test_exactly_with_activation_checkpointing(where: str) -> None:
    """exp(sin x)² + x: the recomputed values are those of the first pass."""
    x = torch.linspace(-1, 1, 7, requires_grad=True)

    def call(a: Tensor) -> Tensor:
        return a.sin().exp()

    def layer(a: Tensor) -> Tensor:
        if where == "inside":
            return exactly(lambda b: checkpoint(call, b, use_reentrant=False), a).square() + a
        return exactly(call, a).square() + a

    with products_in("bf16"):
        found = layer(x) if where == "inside" else checkpoint(layer, x, use_reentrant=False)
        found.sum().backward()
    expected = 2 * x.sin().exp() ** 2 * x.cos() + 1
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.detach())
