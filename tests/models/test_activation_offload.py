"""Inputs of checkpointed layers go to host memory and come back the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import TrainedModelConfig
from rayrlhf.models.activation_offload import ATTRIBUTE, Kept, Transfers, offload_activations
from rayrlhf.models.dropout import keep_dropout
from rayrlhf.models.load import checkpoint_activations, load_policy
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.streams import decoder_layers
from tests.tiny_families import make_family

CPU = torch.device("cpu")
LENGTHS = [12, 7, 5]
HIDDEN = 128


def policy_of(path: str) -> PolicyModel:
    config = TrainedModelConfig(path=path, dtype="float32")
    return load_policy(config, path, device=CPU, chunk_tokens=64)


def transfers_of(policy: PolicyModel) -> Transfers:
    layers = decoder_layers(policy)
    [found] = {getattr(layer, ATTRIBUTE).transfers for layer in layers}
    return found


def loss_of(policy: PolicyModel, seed: int) -> Tensor:
    total = sum(LENGTHS)
    ids = torch.randint(8, 264, (total,), generator=torch.Generator().manual_seed(seed))
    inputs = ids, position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS), torch.ones(total)
    return -policy(*inputs).logprobs.mean()


def gradients(policy: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "deepseek_v3"])
def test_losses_and_gradients_to_the_bit(tmp_path: Any, family: str) -> None:
    """Of two micro-batches, whose gradients add up."""
    path = make_family(tmp_path, family)
    results = []
    for offload in (False, True):
        policy = policy_of(path)
        checkpoint_activations(policy.causal_lm, offload=offload)
        losses = []
        for seed in (1, 2):
            loss = loss_of(policy.train(), seed)
            loss.backward()
            losses.append(loss.item())
        results.append((losses, gradients(policy)))
        if offload:
            transfers, layers = transfers_of(policy), len(decoder_layers(policy))
            assert transfers.num_out == transfers.num_back == 2 * (layers - 1), "all but the last layer's"
    (losses, wanted), (others, found) = results
    assert losses == others
    assert wanted and all(map(torch.equal, wanted, found))


def test_with_the_dropout_of_the_model(tmp_path: Any) -> None:
    """Where transformers' own checkpointing function is at work."""
    path = make_family(tmp_path, "gpt2")
    results = []
    for offload in (False, True):
        policy = policy_of(path)
        checkpoint_activations(policy.causal_lm, offload=offload)
        keep_dropout(policy.train())
        torch.manual_seed(5)
        loss_of(policy, 1).backward()
        results.append(gradients(policy))
        assert not offload or transfers_of(policy).num_out == 1
    assert all(map(torch.equal, *results)) and results[0]


def test_what_a_forward_pass_leaves_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(make_family(tmp_path, "deepseek_v3"))
    checkpoint_activations(policy.causal_lm, offload=True)
    seen: list[Kept] = []
    keep = Transfers.keep

    def recorded(self: Transfers, tensor: Tensor, *, stays: bool) -> Kept:
        seen.append(keep(self, tensor, stays=stays))
        return seen[-1]

    monkeypatch.setattr(Transfers, "keep", recorded)
    loss = loss_of(policy.train(), 1)
    shapes = [None if kept.on_host is None else tuple(kept.on_host.shape) for kept in seen]
    assert shapes == [(1, sum(LENGTHS), HIDDEN)] * 2 + [None]
    assert [kept.on_device is None for kept in seen] == [True, True, False], "the last one stays"
    assert [kept.before() if kept.before is not None else None for kept in seen] == [None, *seen[:2]]
    loss.backward(retain_graph=True)
    first = gradients(policy)
    policy.zero_grad()
    loss.backward()  # takes them a second time
    assert all(map(torch.equal, first, gradients(policy)))


def test_without_gradients_nothing_moves(tmp_path: Any) -> None:
    policy = policy_of(make_family(tmp_path, "llama"))
    checkpoint_activations(policy.causal_lm, offload=True)
    with torch.no_grad():
        loss_of(policy.eval(), 1)
        loss_of(policy.train(), 1)
    assert transfers_of(policy).num_out == 0


def test_models_without_layers_that_are_known() -> None:
    with pytest.raises(ValueError, match="with Linear, whose decoder has no layers"):
        offload_activations(nn.Linear(2, 2))
