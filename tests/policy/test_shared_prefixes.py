"""Updates with shared prefixes are those without: every estimator, through the learner."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rayrlhf.algorithms.registry import ESTIMATORS
from rayrlhf.config.algorithm import AlgorithmConfig
from rayrlhf.config.train import TrainConfig
from rayrlhf.models.attention import VARLEN_SDPA
from rayrlhf.models.heads import ValueModel
from rayrlhf.models.logprobs import PolicyModel
from rayrlhf.policy.actor_critic import Actor, LocalCritic, Ref, infer
from rayrlhf.policy.batches import Packing, balance_and_pack, with_group_advantages, with_token_advantages
from rayrlhf.policy.losses import PolicyObjective, ValueObjective, loss_counts
from rayrlhf.samples import Sample
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.frozen_server import logprobs_of
from tests.plain_engine import PlainLearner
from tests.samples import make_prompt, make_sample

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "attn_implementation": VARLEN_SDPA,
}
TRAIN = TrainConfig(num_steps=10, max_grad_norm=0.0)


def samples() -> list[Sample]:
    """Four groups of four; a tool's tokens in some responses."""
    rng = np.random.default_rng(3)
    made = []
    for group in range(4):
        prompt = make_prompt(rng.integers(1, 64, size=17 + group).tolist(), row_id=group)
        for index in range(4):
            length = int(rng.integers(2, 14))
            mask = [1] * length
            if length > 6:
                mask[2:4] = [0, 0]
            made.append(
                make_sample(
                    rng.integers(1, 64, size=length).tolist(),
                    prompt=prompt,
                    group_id=group,
                    sample_index=index,
                    rollout_logprobs=rng.uniform(-5.0, -3.0, size=length).tolist(),
                    loss_mask=mask,
                    score=float(rng.normal()),
                )
            )
    return made


class Frozen:
    def __init__(self, policy: PolicyModel) -> None:
        self.policy = policy

    @torch.no_grad()
    def logprobs(self, batches: Any, temperature: float) -> Any:
        return [logprobs_of(self.policy, batch, temperature) for batch in batches]


class Result(NamedTuple):
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    prefix_share: float


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}


def policy_of(seed: int, *, experts: bool = False) -> PolicyModel:
    torch.manual_seed(seed)
    causal_lm: Any = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS))
        if experts
        else LlamaForCausalLM(LlamaConfig(**SIZES))
    )
    return PolicyModel(causal_lm, chunk_tokens=16)


def learner_of(module: Any, name: str, *, aux_loss_coef: float = 0.0) -> PlainLearner:
    """Steps of plain SGD, in which nothing magnifies rounding."""
    learner = PlainLearner(module, TRAIN, lr=0.1, name=name, aux_loss_coef=aux_loss_coef)
    learner.engine.optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return learner


def updated(advantage: str, share_prefixes: bool, *, experts: bool = False) -> Result:
    algorithm = AlgorithmConfig(
        advantage=advantage, kl_coef=0.05, kl_in="loss", kl_estimator="k3", entropy_coef=0.01, mini_batches=2
    )
    ranks = Ranks()
    learner = learner_of(policy_of(1, experts=experts), "actor", aux_loss_coef=0.1 * experts)
    actor = Actor(learner, temperature=0.8)
    critic = None
    if algorithm.estimator.needs_critic:
        torch.manual_seed(2)
        decoder = LlamaModel(LlamaConfig(**SIZES))
        critic = LocalCritic(learner_of(ValueModel(decoder, torch.nn.Linear(32, 1)), "critic"))
    packing = Packing(2, 16, 96, seed=0, share_prefixes=share_prefixes)
    scored = with_group_advantages(samples(), advantage)
    mini_batches, balance = balance_and_pack(scored, packing, ranks, step=0)
    mini_batches = infer(mini_batches, actor, Ref(Frozen(policy_of(5)), 0.8), critic)
    mini_batches = with_token_advantages(mini_batches, algorithm, ranks, kl_coef=0.05)
    results: dict[str, float] = {}
    for number, mini_batch in enumerate(mini_batches):
        counts = loss_counts(mini_batch, ranks)
        metrics = actor.update(mini_batch, PolicyObjective(algorithm, counts, 0.05, 16.0), None, step=0)
        if critic is not None:
            values = ValueObjective(algorithm, counts, 0.2, 16.0)
            metrics += critic.start_update(mini_batch, values, step=0).result()
        results |= {f"{number} {key}": value for key, value in metrics.results().items()}
    modules = [actor.learner.module, *([critic.learner.module] if critic is not None else [])]
    weights = {
        f"{i} {name}": tensor.detach()
        for i, module in enumerate(modules)
        for name, tensor in module.named_parameters()
    }
    return Result(results, weights, balance["data/prefix_share"])


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_an_update_is_the_same(advantage: str) -> None:
    check_equal(updated(advantage, False), updated(advantage, True))


def test_every_token_of_a_prefix_counts_in_the_balance_loss() -> None:
    without, with_ = (updated("grpo", share, experts=True) for share in (False, True))
    assert any("balance" in key for key in without.metrics)
    check_equal(without, with_)


def check_equal(without: Result, with_: Result) -> None:
    assert without.prefix_share == 0.0 and with_.prefix_share > 0.3
    assert with_.metrics == pytest.approx(without.metrics, rel=1e-5, abs=1e-5)
    for name, wanted in without.weights.items():
        assert (with_.weights[name] - wanted).norm() <= 1e-5 * wanted.norm(), name
