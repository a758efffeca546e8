"""A prefix that is computed once gives the outputs and gradients of the separate sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import LoraConfig
from rayrlhf.models import attention
from rayrlhf.models.attention import VARLEN_SDPA, Reach, flash_with_prefixes, varlen, varlen_sdpa
from rayrlhf.models.experts import Replay, moe_layers
from rayrlhf.models.heads import ScoreModel, StepModel, ValueModel
from rayrlhf.models.load import checkpoint_activations
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.lora import add_adapters
from rayrlhf.models.parallel import Share
from rayrlhf.models.streams import Streams, with_streams
from rayrlhf.prefixes import SharedPrefixes

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def config_of(family: str) -> Any:
    name, changes = FAMILIES[family]
    return getattr(transformers, name)(**SIZES, **changes)


def policy_of(family: str) -> PolicyModel:
    torch.manual_seed(3)
    causal_lm = AutoModelForCausalLM.from_config(config_of(family), attn_implementation=VARLEN_SDPA)
    return PolicyModel(causal_lm, chunk_tokens=16)


def stream() -> tuple[list[Tensor], SharedPrefixes]:
    """A group of three, a sequence of its own, and a pair of which one answer goes on from the other."""
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    prompt, question = tokens(17), tokens(9)
    sequences = [prompt + tokens(n) for n in (5, 1, 30)] + [tokens(6)]
    sequences += [[*question, 3, 4], [*question, 3, 4, *tokens(8)]]
    lengths = [len(sequence) for sequence in sequences]
    ids, positions = torch.tensor([i for each in sequences for i in each]), position_ids_of(lengths)
    mask = (torch.rand(len(ids), generator=generator) < 0.7).float()
    found = SharedPrefixes.of(cu_seqlens_of(lengths), ids, positions, min_tokens=4)
    assert found is not None and found.prefix_of == (-1, 0, 0, 0, -1, -1, 5, 5)
    return [ids, positions, cu_seqlens_of(lengths), mask], found


def outputs_and_gradients(module: nn.Module, *inputs: Any, **named: Any) -> tuple[list[Tensor], list[Tensor]]:
    module.zero_grad()
    output = module(*inputs, **named)
    outputs = list(output) if isinstance(output, tuple) else [output]
    # Not linear in any output, and with another weight for each.
    weights = (torch.arange(1, 1 + each.numel()).view_as(each) / each.numel() for each in outputs)
    loss = sum(((each + 0.3) ** 2 * weight).sum() for each, weight in zip(outputs, weights, strict=True))
    torch.as_tensor(loss).backward()
    return [each.detach() for each in outputs], [p.grad for p in module.parameters() if p.grad is not None]


def check_equal(module: nn.Module, *inputs: Any, **named: Any) -> None:
    _, prefixes = stream()
    wanted, gradients = outputs_and_gradients(module, *inputs, **named)
    found, shared_gradients = outputs_and_gradients(module, *inputs, **named, prefixes=prefixes)
    assert gradients and len(gradients) == len(shared_gradients)
    for output, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(shared_gradients, gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_policies(family: str) -> None:
    inputs, _ = stream()
    check_equal(policy_of(family).train(), *inputs, 0.7)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_policies_that_recompute_activations(family: str) -> None:
    inputs, _ = stream()
    policy = policy_of(family)
    checkpoint_activations(policy.causal_lm)
    check_equal(policy.train(), *inputs, 0.7)


@pytest.mark.parametrize("recomputed", [False, True])
def test_keys_that_are_gathered_again_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    monkeypatch.setattr(attention, "MOST_KEYS_PER_ROW", 1)
    inputs, prefixes = stream()
    assert len(prefixes.key_rows) > prefixes.num_rows
    policy = policy_of("gemma2")
    if recomputed:
        checkpoint_activations(policy.causal_lm)
    check_equal(policy.train(), *inputs, 0.7)


def test_adapters() -> None:
    inputs, _ = stream()
    policy = policy_of("qwen3")
    add_adapters(policy.causal_lm, LoraConfig(rank=4), seed=0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # 0 at first
            nn.init.normal_(parameter, std=0.1)
    check_equal(policy.train(), *inputs, 0.7)


@pytest.mark.parametrize("kind", [ValueModel, ScoreModel, StepModel])
def test_heads(kind: Any) -> None:
    inputs, _ = stream()
    torch.manual_seed(3)
    decoder = AutoModel.from_config(config_of("llama"), attn_implementation=VARLEN_SDPA)
    head = nn.Linear(48, 2 if kind is StepModel else 1)
    check_equal(kind(decoder, head).train(), *inputs[: 4 if kind is StepModel else 3])


def test_replayed_routes() -> None:
    inputs, prefixes = stream()
    policy = policy_of("qwen3_moe")
    policy.replay = Replay(moe_layers(policy))
    generator = torch.Generator().manual_seed(1)
    of_rows = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(2 * prefixes.num_rows)])
    routes = of_rows.view(-1, 2, 2)[prefixes.rows].to(torch.int16)  # [T, L, K], equal in a prefix
    check_equal(policy.train(), *inputs, 0.7, routed_experts=routes)


def reference_varlen(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, window: int | None
) -> Tensor:
    """What FlashAttention's varlen kernel computes: the last query of each segment is at its last key."""
    outputs = []
    for segment in range(len(ends) - 1):
        q = query[:, :, ends[segment] : ends[segment + 1]]
        k, v = (each[:, :, key_ends[segment] : key_ends[segment + 1]] for each in (key, value))
        k, v = (each.repeat_interleave(q.size(1) // k.size(1), 1) for each in (k, v))
        position = torch.arange(k.size(2) - q.size(2), k.size(2))[:, None]
        behind = position - torch.arange(k.size(2))
        seen = (behind >= 0) & (behind < (window or 10_000))
        scores = (q @ k.transpose(-1, -2) * q.size(-1) ** -0.5).masked_fill(~seen, float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 6])
def test_the_keys_that_the_varlen_kernel_gets(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """In place of the kernel, which runs on GPUs only, a reference with its alignment."""

    def kernel(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **named: Any) -> tuple[Tensor, None]:
        assert mask is None
        assert named["max_length_k"] == int(named["cu_seq_lens_k"].diff().max())
        return reference_varlen(q, k, v, named["cu_seq_lens_q"], named["cu_seq_lens_k"], window), None

    def torchs_kernel(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, max_q: int, max_k: int, **named: Any
    ) -> Tensor:
        assert max_q == int(ends.diff().max()) and max_k == int(key_ends.diff().max())
        assert named == {
            "scale": None,
            "window_size": (-1 if window is None else window - 1, 0),  # those before the token itself
            "enable_gqa": True,
        }
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        return reference_varlen(q, k, v, ends, key_ends, window)[0]

    monkeypatch.setattr(attention, "flash_attention_forward", kernel)
    monkeypatch.setattr(attention, "varlen_attn", torchs_kernel)
    monkeypatch.setattr(attention, "_kernel_computes", lambda *_: True)
    inputs, prefixes = stream()
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, heads, prefixes.num_rows, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    query, key, value = (each[:, :, prefixes.rows] for each in (q, k, v))  # equal in a prefix
    layer: Any = nn.Module()
    layer.num_key_value_groups = 2
    wanted, _ = varlen_sdpa(layer, query, key, value, sliding_window=window, cu_seq_lens_q=inputs[2])
    share = Share.of(inputs[2], len(inputs[0]), None, prefixes)
    named = attention.prefix_inputs(inputs[0], inputs[1], share)
    flash, _ = flash_with_prefixes(layer, q, k, v, sliding_window=window, **named)
    ours, _ = varlen_sdpa(layer, q, k, v, sliding_window=window, **named)
    by_torch, _ = varlen(layer, q, k, v, sliding_window=window, **named)
    assert share.num_attended == 3
    for found in (flash, ours, by_torch):
        torch.testing.assert_close(found[:, prefixes.rows], wanted, rtol=1e-9, atol=1e-9)
    alone = attention.packed_inputs(*inputs[:3])
    found, _ = varlen(layer, query, key, value, sliding_window=window, **alone)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_what_torchs_kernel_does_not_compute_is_left_to_sdpa() -> None:
    """As on a CPU: the same call, the same numbers."""
    inputs, prefixes = stream()
    share = Share.of(inputs[2], len(inputs[0]), None, prefixes)
    named = attention.prefix_inputs(inputs[0], inputs[1], share)
    q, k, v = (torch.randn(1, heads, prefixes.num_rows, 8) for heads in (4, 2, 2))
    layer: Any = nn.Module()
    layer.num_key_value_groups = 2
    for options in ({}, {"softcap": 5.0}, {"sliding_window": 4}):
        wanted, _ = varlen_sdpa(layer, q, k, v, **options, **named)
        found, _ = varlen(layer, q, k, v, **options, **named)
        assert torch.equal(found, wanted)

    def computes(head: int = 64, dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
        query: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, size=lambda _: head)
        return attention._kernel_computes(layer.eval(), query, None, options)

    assert computes() and computes(256) and computes(sliding_window=4, dropout=0.1)
    assert not computes(dtype=torch.float32) and not computes(softcap=5.0)
    assert not computes(512) and not computes(60)


def test_chunks_count_from_the_start_of_the_sequence() -> None:
    """Llama 4: a token after the prefix attends to its chunk, which may begin within the prefix."""
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(1, 2, 13, 8, generator=generator, dtype=torch.float64)
    options = {"scale": None, "dropout_p": 0.0, "enable_gqa": False, "softcap": None}
    whole = attention._attend(key, key, key, Reach(chunk=4), options)
    rest = attention._attend(key[:, :, 6:], key, key, Reach(chunk=4), options)
    torch.testing.assert_close(rest, whole[:, :, 6:], rtol=1e-9, atol=1e-9)


def test_models_that_cannot_share_say_so() -> None:
    inputs, prefixes = stream()
    hint = r"set train\.share_prefixes to false"
    alone = with_streams(policy_of("llama"), Streams(longest_packed=0))
    with pytest.raises(ValueError, match=hint):
        alone(*inputs, prefixes=prefixes)
    otherwise = policy_of("llama")
    otherwise.causal_lm.model.layers[1].self_attn = _Identity()  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ValueError, match=rf"1 of this model's 2 layers .* {hint}"):
        otherwise(*inputs, prefixes=prefixes)
    group: Any = object()
    with pytest.raises(ValueError, match=hint):
        Share.of(inputs[2], len(inputs[0]), group, prefixes)


class _Identity(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None
