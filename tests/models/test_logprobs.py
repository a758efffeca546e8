"""Packed, chunked log-probabilities against plain transformers on each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.attention import VARLEN_SDPA
from rayrlhf.models.load import checkpoint_activations, load_policy
from rayrlhf.models.logprobs import PolicyModel, TokenLogprobs

CPU = torch.device("cpu")
LENGTHS = [5, 1, 9, 2, 17]
VOCABULARY = 264


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def mask_with_holes(count: int) -> Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.6).float()


def run(
    policy: PolicyModel, ids: Tensor, lengths: list[int], mask: Tensor, temperature: float = 1.0
) -> TokenLogprobs:
    return policy(ids, position_ids_of(lengths), cu_seqlens_of(lengths), mask, temperature)


def plain_logprobs(
    model: Any, ids: Tensor, lengths: list[int], mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """One sequence at a time through the model's own forward: log-softmax, gather, -Σ p·log p."""
    logprobs, entropies = [], []
    for sequence in ids.split(lengths):
        logits = model(input_ids=sequence[None]).logits[0].float() / temperature  # [t, V]
        log_softmax = logits.log_softmax(-1)[:-1]
        first = torch.zeros(1)  # nothing is predicted at position 0
        logprobs += [first, log_softmax.gather(-1, sequence[1:, None]).squeeze(-1)]
        entropies += [first, -(log_softmax.exp() * log_softmax).sum(-1)]
    return torch.cat(logprobs) * mask, torch.cat(entropies) * mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def load(path: str, chunk_tokens: int = 1000, **options: Any) -> PolicyModel:
    config = ModelConfig(path=path, **{"dtype": "float32", **options})
    return load_policy(config, path, device=CPU, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_packed_is_unpacked(tiny_model: str, chunk_tokens: int, temperature: float) -> None:
    ids, mask = tokens(sum(LENGTHS)), mask_with_holes(sum(LENGTHS))
    assert 0 < mask[position_ids_of(LENGTHS) > 0].mean() < 1
    weights = torch.randn(2, len(ids), generator=torch.Generator().manual_seed(2)) / len(ids)

    policy = load(tiny_model, chunk_tokens)
    packed = run(policy, ids, LENGTHS, mask, temperature)
    (weights[0] * packed.logprobs + weights[1] * packed.entropy).sum().backward()

    plain = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    ).train()
    logprobs, entropy = plain_logprobs(plain, ids, LENGTHS, mask, temperature)
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()

    torch.testing.assert_close(packed.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.entropy, entropy, rtol=1e-5, atol=1e-5)
    expected = gradients(plain)
    found = gradients(policy.causal_lm)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_numbers_are_the_same(tiny_model: str) -> None:
    ids, mask = tokens(sum(LENGTHS)), mask_with_holes(sum(LENGTHS))
    policy = load(tiny_model, 7)
    with_gradients = run(policy, ids, LENGTHS, mask)
    with torch.no_grad():
        without = run(policy, ids, LENGTHS, mask)
    assert torch.equal(without.logprobs, with_gradients.logprobs)
    assert torch.equal(without.entropy, with_gradients.entropy)


def test_checkpointed_activations_change_no_gradient(tiny_model: str) -> None:
    ids, mask = tokens(sum(LENGTHS)), mask_with_holes(sum(LENGTHS))
    found, kept = [], []
    for checkpointed in (False, True):
        policy = load(tiny_model, 7)
        if checkpointed:
            checkpoint_activations(policy.causal_lm)
            policy.train()  # as before each update
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run(policy, ids, LENGTHS, mask)
        (output.logprobs + output.entropy).sum().backward()
        found.append(gradients(policy.causal_lm))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2, "the layers' activations are not kept"
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_sequence_never_has_a_loss(tiny_model: str) -> None:
    output = run(load(tiny_model), tokens(6), [4, 2], torch.ones(6))
    assert (output.logprobs != 0).tolist() == [False, True, True, True, False, True]
    assert (output.entropy != 0).tolist() == [False, True, True, True, False, True]


def test_an_empty_mask_still_gives_every_parameter_a_gradient(tiny_model: str) -> None:
    # Under ZeRO-3 a rank without loss tokens must take part in the backward pass of the others.
    policy = load(tiny_model)
    output = run(policy, tokens(7), [4, 3], torch.zeros(7))
    assert output.logprobs.tolist() == output.entropy.tolist() == [0.0] * 7
    (output.logprobs.sum() + output.entropy.sum()).backward()
    assert all(not gradient.any() for gradient in gradients(policy).values())


def test_low_precision_models_answer_in_fp32(tiny_model: str) -> None:
    output = run(load(tiny_model, dtype="bfloat16"), tokens(6), [6], torch.ones(6))
    assert output.logprobs.dtype == output.entropy.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def largest_tensor(policy: PolicyModel, lengths: list[int]) -> int:
    """Of a forward and a backward pass with every token in the loss."""
    count = sum(lengths)
    with LargestTensor() as seen:
        output = run(policy, tokens(count), lengths, torch.ones(count), 0.7)
        (output.logprobs + output.entropy).sum().backward()
    return seen.numel


def test_no_tensor_over_tokens_and_vocabulary(tiny_model: str) -> None:
    lengths = [100, 100, 100]  # 297 loss tokens: more logits than any weight has elements
    loss_logits = 297 * VOCABULARY
    assert largest_tensor(load(tiny_model, chunk_tokens=50), lengths) < loss_logits
    assert largest_tensor(load(tiny_model, chunk_tokens=1000), lengths) >= loss_logits, (
        "the probe sees nothing"
    )


def test_the_forward_pass_keeps_no_logits_for_the_backward_pass(tiny_model: str) -> None:
    policy = load(tiny_model, chunk_tokens=5)
    hidden = torch.randn(40, 128, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.head(hidden, tokens(40), 1.0)
    assert not [shape for shape in kept if shape == (5, VOCABULARY)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.head.weight.new_zeros(5, VOCABULARY).requires_grad_().log_softmax(-1)
    assert (5, VOCABULARY) in kept, "the probe sees nothing"


def small_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
    }


def config_with_scaled_logits(name: str) -> Any:
    from transformers import CohereConfig, Gemma2Config, GraniteConfig

    if name == "granite":
        return GraniteConfig(**small_sizes(), logits_scaling=4.0)
    if name == "cohere":
        return CohereConfig(**small_sizes(), logit_scale=0.25)
    return Gemma2Config(**small_sizes(), final_logit_softcapping=3.0, attn_logit_softcapping=None)


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_models_that_change_their_logits(name: str) -> None:
    """Granite divides them, Cohere multiplies them, Gemma 2 caps them; the head must do the same."""
    config, plain_config = config_with_scaled_logits(name), config_with_scaled_logits(name)
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_SDPA)
    plain = AutoModelForCausalLM.from_config(plain_config, attn_implementation="eager")
    plain.load_state_dict(causal_lm.state_dict())
    ids, mask = tokens(12), torch.ones(12)
    output = run(PolicyModel(causal_lm, chunk_tokens=5), ids, [7, 5], mask, 0.7)
    logprobs, entropy = plain_logprobs(plain, ids, [7, 5], mask, 0.7)
    torch.testing.assert_close(output.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, entropy, rtol=1e-5, atol=1e-5)
