"""Routers of mixtures of experts: found, recorded and replayed in every architecture that is supported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from rayrlhf.batch import cu_seqlens_of, position_ids_of
from rayrlhf.config.model import ModelConfig
from rayrlhf.models.experts import Replay, moe_layers, recorded
from rayrlhf.models.load import checkpoint_activations, load_policy
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.models.router_probe import RouterVerdict, router_verdict
from tests.tiny_families import make_family

LENGTHS = [7, 11]
IDS = torch.randint(8, 264, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_family(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def policy_of(folder: str) -> PolicyModel:
    return load_policy(
        ModelConfig(path=folder, dtype="float32"), folder, device=torch.device("cpu"), chunk_tokens=64
    )


def logprobs_of(policy: PolicyModel, routes: Tensor | None = None) -> Tensor:
    mask = torch.ones(len(IDS))
    return policy(
        IDS, position_ids_of(LENGTHS), cu_seqlens_of(LENGTHS), mask, 1.0, routed_experts=routes
    ).logprobs


def routes_of(policy: PolicyModel) -> Tensor:
    """[T, L, K]."""
    with recorded(moe_layers(policy)) as recorder:
        logprobs_of(policy)
    return torch.stack([routed.chosen for routed in recorder.routed()], 1)


def test_given_experts_are_used_also_where_activations_are_recomputed(folder: str) -> None:
    """With the gradient of the given choice; -1 leaves the choice to the router."""
    policy = policy_of(folder)
    layers = moe_layers(policy)
    assert [name.split(".")[-1] for name, _, _ in layers] == ["mlp"] * len(layers)
    own, plain = routes_of(policy), logprobs_of(policy).detach()
    policy.replay = Replay(layers)
    assert torch.equal(logprobs_of(policy, own.to(torch.int16)), plain)
    assert torch.equal(logprobs_of(policy, torch.full_like(own, -1)), plain)
    assert torch.equal(logprobs_of(policy), plain), "what was replayed before is forgotten"
    others = torch.stack([own[..., 0], (own[..., 0] + 1) % 4], -1)
    gradients = []
    for checkpointing in (False, True):
        again = policy_of(folder)
        again.replay = Replay(moe_layers(again))
        if checkpointing:
            checkpoint_activations(again.causal_lm)
            again.train()
        with recorded(moe_layers(again)) as recorder:
            output = logprobs_of(again, others)
        chosen = torch.stack([routed.chosen for routed in recorder.routed()], 1)
        assert torch.equal(chosen, others)
        assert not torch.allclose(output, plain, atol=1e-3)
        output.sum().backward()
        gradients.append([p.grad for p in again.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_another_number_of_layers_is_an_error(folder: str) -> None:
    policy = policy_of(folder)
    own = routes_of(policy)
    policy.replay = Replay(moe_layers(policy))
    with pytest.raises(ValueError, match="the engine routes in 3 layers, the trainer's model in 2"):
        logprobs_of(policy, own[:, [0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("qwen3_moe", RouterVerdict(2, "softmax", can_replay=True)),
        ("gpt_oss", RouterVerdict(2, "softmax", can_replay=True)),
        ("deepseek_v3", RouterVerdict(1, "sigmoid", can_replay=True)),
        ("glm4_moe", RouterVerdict(1, "sigmoid", can_replay=True)),
    ],
)
def test_scores_and_replay_by_architecture(kind: str, verdict: RouterVerdict) -> None:
    config: Any = AutoConfig.for_model(kind)
    assert router_verdict(config) == verdict


def test_routers_that_do_not_choose_by_one_top_k_cannot_be_replayed() -> None:
    jamba = router_verdict(AutoConfig.for_model("jamba"))
    assert jamba.scoring == "softmax" and not jamba.can_replay and "top-k" in jamba.reason
    phi = router_verdict(AutoConfig.for_model("phimoe"))
    assert phi.scoring is None and "neither by softmax nor by sigmoid" in phi.reason
