"""What a training step does with its mini-batches, with a real optimizer on four logits and no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from rayrlhf.policy.critic import NoCritic
from torch import Tensor

from rayrlhf.algorithms.kl import AdaptiveKL
from rayrlhf.batch import PackedBatch, pack_samples
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.observe.metric_keys import check_keys
from rayrlhf.policy import actor_critic as learners_module
from rayrlhf.policy.actor_critic import Learners
from rayrlhf.samples import Sample
from rayrlhf.train.learner import Term
from tests.samples import make_config, make_prompt, make_sample

SIZE = 4  # of the vocabulary
LN4 = math.log(SIZE)


class Actor(torch.nn.Module):
    """A policy that knows no context, under AdamW."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(SIZE))
        self.optimizer = torch.optim.AdamW([self.logits], lr=lr, weight_decay=0.0)
        self.updates: list[list[int]] = []  # learnt tokens of each term, per optimizer step
        self.steps: list[int] = []

    def forward(self, input_ids: Tensor, *_: Any) -> TokenLogprobs:
        logprobs = self.logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum()
        return TokenLogprobs(logprobs[input_ids], entropy.expand(len(input_ids)))

    @torch.no_grad()
    def infer(self, batches: Sequence[PackedBatch], forward: Any) -> list[TokenLogprobs]:
        return [forward(self, batch) for batch in batches]

    def update(self, *terms: Term, step: int) -> dict[str, float]:
        self.optimizer.zero_grad()
        sums: dict[str, float] = {"loss/actor": 0.0}
        for term in terms:
            for batch in term.batches:
                share, metrics = term.loss(term.forward(self, batch), batch)
                share.backward()
                sums["loss/actor"] += share.item()
                for key, value in metrics.items():
                    old = sums.get(key, 0.0)
                    sums[key] = max(old, float(value)) if key.endswith("_max") else old + float(value)
        assert self.logits.grad is not None
        norm = float(self.logits.grad.norm())
        self.optimizer.step()
        self.steps.append(step)
        self.updates.append([sum(int(b.loss_mask.sum()) for b in term.batches) for term in terms])
        return sums | {
            "loss/actor_grad_norm": norm,
            "loss/actor_lr": 0.1,
            "loss/actor_bad_steps": 0.0,
        }


class Uniform:
    """A reference that is the policy before it has learnt anything."""

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        return [torch.full_like(batch.loss_mask, -LN4) for batch in batches]


def learners_of(config: PolicyRunConfig, actor: Any, **others: Any) -> Any:
    learners: Any = Learners.__new__(Learners)
    learners.config, learners.algorithm = config, config.algorithm
    learners.temperature = 1.0
    learners.actor, learners.critic, learners.average = actor, NoCritic(), None
    learners.reference = others.get("reference")
    learners.kl = learners_module.make_kl_controller(config.algorithm)
    learners.metrics = {}
    return learners


def phase(_: str) -> Any:
    return nullcontext()


def config_of(num_samples: int, **algorithm: Any) -> PolicyRunConfig:
    return make_config(
        algorithm={"advantage": "reinforce_pp", "kl_coef": 0.0, "whiten_advantages": False, **algorithm},
        rollout={"prompts_per_step": num_samples, "group_size": 1},
    )


def samples_of(*responses: Sequence[int], masks: Sequence[Sequence[int]] | None = None) -> list[Sample]:
    return [
        make_sample(
            ids,
            prompt=make_prompt([0]),
            group_id=i,
            score=float(i % 2),
            loss_mask=masks[i] if masks is not None else None,
        )
        for i, ids in enumerate(responses)
    ]


def test_11_a_mini_batch_without_a_token_takes_no_optimizer_step() -> None:
    """Two samples of a tool's tokens alone make up mini-batches of their own, in both passes."""
    config = config_of(4, mini_batches=4, updates_per_batch=2)
    actor = Actor()
    learners = learners_of(config, actor)
    masks = [[1, 1], [1, 1], [0, 0], [0, 0]]
    learners.learn(samples_of([1, 2], [2, 1], [3, 3], [3, 1], masks=masks), 7, phase)
    assert actor.updates == [[2]] * 4 and actor.steps == [7] * 4
    assert learners.metrics["data/empty_mini_batches"] == 4.0
    assert learners.metrics["data/mini_batches"] == 4.0
    check_keys(learners.metrics)


def test_11_a_step_of_nothing_but_a_tools_tokens_moves_nothing() -> None:
    """AdamW on a gradient of 0 would: by its moments, a good part of the learning rate."""
    actor = Actor()
    learners = learners_of(config_of(2, mini_batches=2), actor)
    learners.learn(samples_of([1, 2], [3, 1]), 0, phase)
    before, learners.metrics = actor.logits.detach().clone(), {}
    learners.learn(samples_of([1, 2], [2, 1], masks=[[0, 0], [0, 0]]), 1, phase)
    assert torch.equal(actor.logits, before)
    assert learners.metrics["data/empty_mini_batches"] == 2.0
    assert "loss/actor" not in learners.metrics, "a mean over nothing is no 0"


def test_10_metrics_are_over_all_passes_and_mini_batches() -> None:
    """By hand, with a learning rate of 0: ratio 1, entropy ln 4, and |trainer - engine| differs by sample."""
    config = config_of(3, mini_batches=3, updates_per_batch=2)
    actor = Actor(lr=0.0)
    learners = learners_of(config, actor)
    samples = [
        make_sample(
            [1] * length,
            prompt=make_prompt([0]),
            group_id=i,
            score=1.0,
            rollout_logprobs=[-LN4 - difference] * length,
        )
        for i, (length, difference) in enumerate([(1, 0.4), (2, 0.1), (5, 0.0)])
    ]
    learners.learn(samples, 0, phase)
    metrics = learners.metrics
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx((0.4 + 2 * 0.1) / 8, abs=1e-6)
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(0.4, abs=1e-6), "of all mini-batches"
    assert metrics["loss/ratio"] == pytest.approx(1.0)
    assert metrics["loss/entropy"] == pytest.approx(LN4)
    assert metrics["loss/actor"] == pytest.approx(-1.0), "-A of every token, whatever its mini-batch"
    assert metrics["loss/actor_bad_steps"] == 0.0 and metrics["loss/actor_lr"] == pytest.approx(0.1)


def test_10_the_adaptive_kl_is_steered_by_the_step_and_not_by_its_last_mini_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KLs of eight mini-batches of equal size, mean 0.0575: from 0.1 to 0.214 in 50 steps of 1024 samples
    with a target of 0.05. By the last one, 0.20, it would be 0.276.
    """
    kls = [0.02, 0.02, 0.03, 0.03, 0.04, 0.05, 0.07, 0.20]
    config = config_of(
        8, mini_batches=8, kl_coef=0.1, kl_controller="adaptive", kl_target=0.05, kl_horizon=10_000
    )

    class Told(Actor):
        def update(self, *terms: Term, step: int) -> dict[str, float]:
            measured = super().update(*terms, step=step)
            return measured | {"kl/mean": kls[(len(self.updates) - 1) % 8] * self.updates[-1][0]}

    learners = learners_of(config, Told(lr=0.0), reference=Uniform())
    assert isinstance(learners.kl, AdaptiveKL)
    update, seen = learners.kl.update, []
    monkeypatch.setattr(learners.kl, "update", lambda kl, n: (seen.append((kl, n)), update(kl, 128 * n)))
    for step in range(4):
        learners.metrics = {}
        learners.learn(samples_of(*[[1, 2]] * 8), step, phase)
    assert seen == [(pytest.approx(0.0575), 8)] * 4
    for kl, _ in [seen[-1]] * 46:
        update(kl, 1024)
    # (1 + (0.0575/0.05 - 1) · 1024/10000)^50 = 1.01536^50
    assert learners.kl.coef == pytest.approx(0.1 * 1.01536**50) == pytest.approx(0.2143, abs=1e-4)


def test_17_the_texts_of_a_step_are_in_every_update() -> None:
    """PPO-ptx: 2 passes over 3 mini-batches have the same texts, whole, six times."""
    actor = Actor()
    config = config_of(6, mini_batches=3, updates_per_batch=2)
    config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"ptx_coef": 0.5})})
    learners = learners_of(config, actor)
    texts = [pack_samples(samples_of([1, 2, 3])), pack_samples(samples_of([3, 3]))]
    learners.learn(samples_of(*[[1, 2]] * 6), 0, phase, texts=texts)
    assert actor.updates == [[4, 5]] * 6
    assert 0.5 < learners.metrics["loss/ptx"] < 1.3863, "below ln 4: it is of all six updates"
