"""Compiled layers give the outputs and gradients of the same layers, in few graphs for all lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import cpp_builder

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import LoraConfig, TrainedModelConfig
from rayrlhf.models import compiled_layers
from rayrlhf.models.adapters import adapters_off
from rayrlhf.models.checkpoint_tensors import checkpoint_tensors
from rayrlhf.models.compiled_layers import compile_layers, why_not_compiled
from rayrlhf.models.cpu_products import cast_linear_layers, products_in
from rayrlhf.models.experts import moe_layers, recorded
from rayrlhf.models.load import adapt, checkpoint_activations, load_policy
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.streams import decoder_layers
from rayrlhf.prefixes import SharedPrefixes
from tests.tiny_families import make_family

CPU = torch.device("cpu")
LENGTHS = ([5, 9, 3], [40, 2], [7], [100, 30, 1, 1])
# Of a layer: the first norm; queries, keys and values; the output's projection; the rest. Another one for
# what a first layer gets from the embeddings.
GRAPHS = 5
TOLERANCE = 1e-5  # of gradients, of the largest element of each; measured: 4e-6
LORA = LoraConfig(rank=4)


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # of what pytest would capture
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


def policy_of(path: str, **settings: Any) -> PolicyModel:
    config = TrainedModelConfig(path=path, dtype="float32", **settings)
    policy = load_policy(config, path, device=CPU, chunk_tokens=64)
    adapt(config, policy.causal_lm, device=CPU, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # 0 at first, where A has no gradient
            parameter.data.normal_(0, 0.02, generator=generator)
    return policy


def inputs_of(lengths: list[int]) -> tuple[Tensor, ...]:
    total = sum(lengths)
    ids = torch.randint(8, 264, (total,), generator=torch.Generator().manual_seed(total))
    return ids, position_ids_of(lengths), cu_seqlens_of(lengths), torch.ones(total)


def loss_and_gradients(policy: PolicyModel, lengths: list[int], **named: Any) -> tuple[float, list[Tensor]]:
    policy.zero_grad()
    loss = -policy(*inputs_of(lengths), **named).logprobs.mean()
    loss.backward()
    return loss.item(), [p.grad for p in policy.parameters() if p.grad is not None]


def check_equal(eager: PolicyModel, compiled: PolicyModel, lengths: list[int], **named: Any) -> None:
    (wanted, gradients), (found, others) = (
        loss_and_gradients(policy, lengths, **named) for policy in (eager, compiled)
    )
    assert found == pytest.approx(wanted, rel=1e-6)
    assert gradients and len(gradients) == len(others)
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient - other).abs().max() <= TOLERANCE * gradient.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_kernels_of_the_compiler(folder: Any, family: str) -> None:
    eager, compiled = policy_of(folder(family)), policy_of(folder(family))
    counter = CompileCounterWithBackend("inductor")
    compile_layers(compiled, backend=counter)
    for lengths in LENGTHS:
        check_equal(eager.train(), compiled.train(), lengths)
        assert counter.frame_count <= GRAPHS
    with torch.no_grad():
        for lengths in LENGTHS:
            wanted, found = (policy.eval()(*inputs_of(lengths)).logprobs for policy in (eager, compiled))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
            assert counter.frame_count <= 2 * GRAPHS


VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": LORA},
    "adapters, checkpointing": {"lora": LORA, "checkpointing": True},
    "adapters on 4 bits": {"lora": LORA, "quantization": "nf4"},
    "sliding windows": {"family": "gemma3"},
    "experts, checkpointing": {"family": "mixtral", "checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs(folder: Any, variant: str) -> None:
    """The same graphs serve every length, with what else changes a layer. Without the compiler's kernels,
    which are those of `test_kernels_of_the_compiler`.
    """
    settings = dict(VARIANTS[variant])
    family, checkpointing = settings.pop("family", "llama"), settings.pop("checkpointing", False)
    eager, compiled = (policy_of(folder(family), **settings) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(compiled, backend=counter)
    for policy in (eager, compiled):
        if checkpointing:
            checkpoint_activations(policy.causal_lm)
        policy.train()
    check_equal(eager, compiled, LENGTHS[0])
    first = counter.frame_count
    assert 0 < first <= 2 * GRAPHS
    for lengths in LENGTHS[1:]:
        check_equal(eager, compiled, lengths)
    assert counter.frame_count == first, "another length is no reason to compile again"


@pytest.mark.slow
def test_reference_without_adapters(folder: Any) -> None:
    compiled = policy_of(folder("qwen3"), lora=LORA)
    base = policy_of(folder("qwen3"))
    compile_layers(compiled, backend="aot_eager")
    with torch.no_grad():
        own = compiled(*inputs_of([6, 8])).logprobs
        with adapters_off(compiled):
            found = compiled(*inputs_of([6, 8])).logprobs
        wanted = base(*inputs_of([6, 8])).logprobs
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (own - found).abs().max() > 1e-3


def test_a_served_reference(folder: Any) -> None:
    """Which computes in inference mode."""
    eager, compiled = policy_of(folder("llama")), policy_of(folder("llama"))
    compile_layers(compiled, backend="aot_eager")
    with torch.inference_mode():
        for lengths in LENGTHS[:2]:
            wanted, found = (policy.eval()(*inputs_of(lengths)).logprobs for policy in (eager, compiled))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_products_by_casts(folder: Any, lora: LoraConfig | None) -> None:
    """Factors rounded to bf16 make of a difference of 1e-7 one of 2^-9 where it crosses a boundary."""
    eager, compiled = (policy_of(folder("llama"), lora=lora) for _ in range(2))
    for policy in (eager, compiled):
        cast_linear_layers(policy)
    compile_layers(compiled, backend="aot_eager")
    found = 0.0
    with products_in("ieee", casts=True):
        for lengths in LENGTHS[:2]:
            (wanted, gradients), (found, others) = (
                loss_and_gradients(policy.train(), lengths) for policy in (eager, compiled)
            )
            assert found == pytest.approx(wanted, rel=1e-3)
            for gradient, other in zip(gradients, others, strict=True):
                assert (gradient - other).norm() <= 1e-2 * gradient.norm()
    exact, _ = loss_and_gradients(compiled.train(), LENGTHS[1])
    assert exact != found, "the factors were rounded"


def test_shared_prefixes(folder: Any) -> None:
    lengths = [20, 24, 9, 30]
    ids, positions, ends, mask = inputs_of(lengths)
    ids[20:38] = ids[:18]  # 18 tokens in common
    shared = SharedPrefixes.of(ends, ids, positions)
    assert shared is not None and shared.num_rows == sum(lengths) - 18
    eager, compiled = policy_of(folder("qwen2")), policy_of(folder("qwen2"))
    compile_layers(compiled, backend="aot_eager")
    results = []
    for policy, prefixes in ((eager, None), (compiled, shared), (compiled, None)):
        policy.zero_grad()
        logprobs = policy(ids, positions, ends, mask, prefixes=prefixes).logprobs
        logprobs.square().sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.slow
def test_recorded_routers(folder: Any) -> None:
    """The balance loss reads the routers' logits, with their gradients."""
    eager, compiled = (policy_of(folder("qwen3_moe")) for _ in range(2))
    compile_layers(compiled, backend="aot_eager")
    logits = []
    for policy in (eager, compiled):
        layers = moe_layers(policy)
        with recorded(layers) as recorder:
            policy.train()(*inputs_of([9, 4]))
        routed = recorder.routed()
        routed[0].logits.logsumexp(-1).sum().backward()
        assert len(routed) == len(layers) and layers[0].router.weight.grad is not None
        logits.append((routed[1].logits.detach(), layers[0].router.weight.grad))
    for found, wanted in zip(*logits, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_less_is_kept_for_the_backward_pass(folder: Any) -> None:
    """So the memory plan, which counts compiled layers as if they were not, plans enough."""
    kept = []
    for compiled in (False, True):
        policy = policy_of(folder("llama")).train()
        if compiled:  # what the compiler keeps, without its kernels
            compile_layers(policy, backend="aot_eager_decomp_partition")
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        saved: dict[int, Tensor] = {}

        def save(tensor: Tensor, weights: Any = weights, saved: Any = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        policy(*inputs_of([64, 64]))  # compiles
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = policy(*inputs_of([64, 64]))
        assert output.logprobs.requires_grad
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
    assert 0.5 * kept[0] < kept[1] < 0.9 * kept[0]


def test_names_stay(folder: Any) -> None:
    """Of parameters, exports and pushes."""
    eager, compiled = (policy_of(folder("llama"), lora=LORA) for _ in range(2))
    compile_layers(compiled, backend="aot_eager")
    compiled(*inputs_of([4]))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    pushed = [
        [
            (spec.name, spec.shape)
            for tensors in checkpoint_tensors(policy.causal_lm)
            for spec in tensors.specs
        ]
        for policy in (eager, compiled)
    ]
    assert pushed[0] == pushed[1] and pushed[0]


def test_loading(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("llama")
    found: list[Any] = []
    monkeypatch.setattr(compiled_layers, "compile_layers", found.append)
    policy = load_policy(TrainedModelConfig(path=path, compile=True), path, device=CPU, chunk_tokens=64)
    assert found == [policy] and len(decoder_layers(policy)) == 2


def test_a_machine_without_a_compiler(folder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert why_not_compiled(on_gpu=False) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    assert why_not_compiled(on_gpu=False) == "a C++ compiler (g++)"
    config = TrainedModelConfig(path=folder("llama"), compile=True)
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler"):
        load_policy(config, config.path, device=CPU, chunk_tokens=64)
