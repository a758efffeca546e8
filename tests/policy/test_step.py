"""The policy loop with a real optimizer on four logits, and neither engines nor checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.algorithms.kl import AdaptiveKL
from rayrlhf.algorithms.metrics import Mean, Metrics
from rayrlhf.batch import PackedBatch
from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.models.logprobs import TokenLogprobs
from rayrlhf.observe.metric_keys import check_keys
from rayrlhf.policy.actor_critic import Actor, LocalCritic, Ref, make_kl_controller
from rayrlhf.policy.colocation import Colocation
from rayrlhf.policy.loop import policy_loop
from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.push_check import MismatchAlarm, PushCheck
from rayrlhf.policy.rollouts import Rewards
from rayrlhf.policy.run_state import Run, Streams
from rayrlhf.reward.combine import RewardCombiner
from rayrlhf.runtime.progress import Progress
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.checkpoint import LoopState, Saved
from rayrlhf.train.collectives import Ranks
from rayrlhf.train.learner import Term
from tests.plain_engine import PlainLearner
from tests.samples import make_config, make_prompt, make_sample

SIZE = 4  # of the vocabulary
LN4 = math.log(SIZE)


class Logits(torch.nn.Module):
    """A policy that knows no context."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(SIZE))

    @property
    def causal_lm(self) -> Logits:
        return self

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> TokenLogprobs:
        logprobs = self.logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum()
        return TokenLogprobs(logprobs[input_ids], entropy.expand(len(input_ids)))


class Bias(torch.nn.Module):
    """A critic that gives every state the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.bias + torch.zeros(len(input_ids))


class Uniform:
    """A reference that is the policy before its first update."""

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        return [torch.full_like(batch.loss_mask, -LN4) for batch in batches]


class StepSamples:
    """A source of groups that has the samples of each step."""

    def __init__(self, steps: Sequence[Sequence[Sample]]) -> None:
        self.steps = list(steps)

    def next(self, step: int) -> list[Sample]:
        return list(self.steps.pop(0))

    def drain_restarted(self) -> int:
        return 0

    def close(self) -> None:
        assert not self.steps


class AllScored:
    """The counts of a reward client that could grade every answer."""

    def drain_unverified(self) -> int:
        return 0

    def drain_failures(self) -> dict[str, str]:
        return {}

    def check(self, num_failed: int, num_samples: int) -> None:
        assert num_failed == 0


class Reports:
    """What rank 0 reports."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []  # by step

    def step(self, step: int, metrics: dict[str, float], shown: Sequence[Sample]) -> None:
        check_keys(metrics)
        self.metrics.append(metrics)

    def say(self, step: int, text: str) -> None: ...

    def event(self, step: int, text: str) -> None: ...

    def warn(self, step: int, text: str) -> None: ...

    def flush(self) -> None: ...


class InMemory:
    """Checkpoints: resumes from `state`, and saves nothing."""

    pending = None

    def __init__(self, state: LoopState) -> None:
        self.state = state

    def restore(self, saved: Sequence[Saved]) -> LoopState:
        return self.state

    def save(self, state: LoopState, saved: Sequence[Saved], elsewhere: Sequence[str]) -> None: ...

    def finish(self) -> None: ...

    def node_to_be_reclaimed(self) -> str | None:
        return None


class Pushes:
    """Weight transfer to engines that always have the newest weights: what each version is."""

    def __init__(self, module: Logits) -> None:
        self.module = module
        self.versions: dict[int, Tensor] = {}

    def needs_push(self, version: int) -> bool:
        return False

    def push(self, weights: Any, version: int, *, verify: bool = False) -> str | None:
        self.versions[version] = self.module.logits.detach().clone()
        return None

    def num_refused_connections(self) -> int:
        return 0

    def weights_change(self) -> None: ...

    def drain_store_restarts(self) -> int:
        return 0

    def close(self) -> None: ...


@dataclass
class Outcome:
    metrics: list[dict[str, float]]  # by step
    weights: dict[int, Tensor]  # by version: the logits
    steps: int  # done, in all


def run_loop(
    config: PolicyRunConfig,
    learner: PlainLearner,
    *steps: Sequence[Sample],
    first_step: int = 0,
    texts: Sequence[Prompt] = (),
    **models: Any,
) -> Outcome:
    """The loop over steps with these samples; `config` has as many steps, from `first_step` on."""
    ranks = Ranks()
    kl = models.get("kl") or make_kl_controller(config.algorithm)
    reports: Any = Reports()
    pushes: Any = Pushes(learner.module)
    client: Any = AllScored()
    collector: Any = SimpleNamespace(rollouts=SimpleNamespace(drain_retries=lambda: 0))
    checkpoints: Any = InMemory(LoopState(step=first_step, kl_controller=kl.state_dict()))
    random_states: Any = None  # only in checkpoints

    def every_step(first: int) -> Iterator[tuple[int, list[Prompt]]]:
        return ((step, list(texts)) for step in range(first, first_step + len(steps)))

    run = Run(
        config=config,
        ranks=ranks,
        progress=Progress(config, ranks, reports, checkpoints),
        streams=Streams(train=every_step, eval=list, texts=every_step if texts else None),
        prompts=PromptQueue(rank=0, per_rank=1, prompts_per_batch=1),
        collector=collector,
        rollouts=StepSamples(steps),
        rewards=Rewards(client, RewardCombiner(config.reward, response_limit=100)),
        actor=Actor(learner, temperature=1.0),
        critic=models.get("critic"),
        ref=models.get("ref"),
        kl=kl,
        weights=pushes,
        weight_route="object_store",
        colocation=Colocation(pushes, ranks, engines_sleep=False, on_gpu=False),
        push_check=PushCheck(config.model.path, limit=None),
        mismatch_alarm=MismatchAlarm(limit=None),
        random_states=random_states,
    )
    result = policy_loop(run)
    return Outcome(reports.metrics, pushes.versions, result.steps)


def config_of(
    num_samples: int,
    *,
    num_steps: int = 1,
    budget: int = 64,
    data: dict[str, Any] | None = None,
    **algorithm: Any,
) -> PolicyRunConfig:
    return make_config(
        algorithm={"advantage": "reinforce_pp", "kl_coef": 0.0, "whiten_advantages": False, **algorithm},
        checkpoint={"export": False},
        data={"max_prompt_tokens": 2, **(data or {})},
        rollout={"prompts_per_step": num_samples, "group_size": 1, "sampling": {"max_new_tokens": 4}},
        train={"num_steps": num_steps, "lr": 0.1, "max_tokens_per_micro_batch": budget},
    )


def actor_of(config: PolicyRunConfig, *, is_frozen: bool = False) -> PlainLearner:
    return PlainLearner(Logits(), config.train, lr=config.train.lr, is_frozen=is_frozen)


def scored(samples: Sequence[Sample]) -> list[Sample]:
    """Of one reward source, whose reward is the score."""
    return [replace(sample, source_rewards=(sample.score,)) for sample in samples]


def samples_of(*responses: Sequence[int], masks: Sequence[Sequence[int]] | None = None) -> list[Sample]:
    return scored(
        [
            make_sample(
                ids,
                prompt=make_prompt([0]),
                group_id=i,
                score=float(i % 2),
                loss_mask=masks[i] if masks is not None else None,
            )
            for i, ids in enumerate(responses)
        ]
    )


def test_11_a_mini_batch_without_a_token_takes_no_optimizer_step() -> None:
    """Two samples of a tool's tokens alone make up separate mini-batches, in both passes."""
    config = config_of(4, num_steps=8, mini_batches=4, updates_per_batch=2)
    actor = actor_of(config)
    masks = [[1, 1], [1, 1], [0, 0], [0, 0]]
    samples = samples_of([1, 2], [2, 1], [3, 3], [3, 1], masks=masks)
    outcome = run_loop(config, actor, samples, first_step=7)
    assert actor.updates == [[2]] * 4 and actor.steps == [7] * 4
    [metrics] = outcome.metrics
    assert metrics["data/empty_mini_batches"] == 4.0
    assert metrics["data/mini_batches"] == 4.0
    assert outcome.steps == 8


def test_11_a_step_of_nothing_but_a_tools_tokens_moves_nothing() -> None:
    """AdamW on a gradient of 0 would: by its moments, a good part of the learning rate."""
    config = config_of(2, num_steps=2, mini_batches=2)
    of_a_tool = samples_of([1, 2], [2, 1], masks=[[0, 0], [0, 0]])
    outcome = run_loop(config, actor_of(config), samples_of([1, 2], [3, 1]), of_a_tool)
    assert outcome.weights[1].any() and torch.equal(outcome.weights[2], outcome.weights[1])
    metrics = outcome.metrics[1]
    assert metrics["data/empty_mini_batches"] == 2.0
    assert "loss/actor" not in metrics, "a mean over nothing is no 0"


def test_10_metrics_are_over_all_passes_and_mini_batches() -> None:
    """By hand, with weights that stay: ratio 1, entropy ln 4, and |trainer - engine| differs by sample."""
    config = config_of(3, mini_batches=3, updates_per_batch=2)
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
    [metrics] = run_loop(config, actor_of(config, is_frozen=True), scored(samples)).metrics
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx((0.4 + 2 * 0.1) / 8, abs=1e-6)
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(0.4, abs=1e-6), "of all mini-batches"
    assert metrics["loss/ratio"] == pytest.approx(1.0)
    assert metrics["loss/entropy"] == pytest.approx(LN4)
    assert metrics["loss/actor"] == pytest.approx(-1.0), "-A of every token, whatever its mini-batch"
    assert metrics["loss/actor_bad_steps"] == 0.0 and metrics["loss/actor_lr"] == pytest.approx(0.1)


class GivenKLs(PlainLearner):
    """Measures these KLs, one per optimizer step of a training step."""

    kls: Sequence[float]

    def update(self, *terms: Term, step: int, weight: float = 1.0) -> Metrics:
        measured = super().update(*terms, step=step, weight=weight)
        tokens = self.updates[-1][0]
        kl = self.kls[(len(self.updates) - 1) % len(self.kls)]
        measured["kl/mean"] = Mean(kl * tokens, float(tokens))
        return measured


class Steered(AdaptiveKL):
    """Notes what it is given, and takes a step of 8 samples for one of 1024."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[float, int]] = []

    def update(self, mean_kl: float, num_samples: int) -> None:
        self.seen.append((mean_kl, num_samples))
        super().update(mean_kl, 128 * num_samples)


def test_10_the_adaptive_kl_is_steered_by_the_step_and_not_by_its_last_mini_batch() -> None:
    """KLs of eight mini-batches of equal size, mean 0.0575: from 0.1 to 0.214 in 50 steps of 1024 samples
    with a target of 0.05. By the last one, 0.20, it would be 0.276.
    """
    config = config_of(
        8,
        num_steps=4,
        mini_batches=8,
        kl_coef=0.1,
        kl_controller="adaptive",
        kl_target=0.05,
        kl_horizon=10_000,
    )
    actor = GivenKLs(Logits(), config.train, is_frozen=True)
    actor.kls = [0.02, 0.02, 0.03, 0.03, 0.04, 0.05, 0.07, 0.20]
    assert type(make_kl_controller(config.algorithm)) is AdaptiveKL
    kl = Steered(0.1, 0.05, 10_000)
    steps = [samples_of(*[[1, 2]] * 8) for _ in range(4)]
    outcome = run_loop(config, actor, *steps, kl=kl, ref=Ref(Uniform(), temperature=1.0))
    assert kl.seen == [(pytest.approx(0.0575), 8)] * 4
    assert outcome.metrics[-1]["kl/coef"] == kl.coef
    for mean_kl, _ in [kl.seen[-1]] * 46:
        kl.update(mean_kl, 8)
    # (1 + (0.0575/0.05 - 1) · 1024/10000)^50 = 1.01536^50
    assert kl.coef == pytest.approx(0.1 * 1.01536**50) == pytest.approx(0.2143, abs=1e-4)


def test_17_the_texts_of_a_step_are_in_every_update() -> None:
    """PPO-ptx: 2 passes over 3 mini-batches have the same texts, whole, six times."""
    config = config_of(
        6,
        budget=6,  # the texts are two micro-batches
        data={"ptx": {"sources": "texts.jsonl", "texts_per_step": 2, "max_tokens": 6}},
        mini_batches=3,
        updates_per_batch=2,
        ptx_coef=0.5,
    )
    actor = actor_of(config)
    texts = [make_prompt([0, 1, 2, 3]), make_prompt([0, 3, 3], row_id=1)]
    [metrics] = run_loop(config, actor, samples_of(*[[1, 2]] * 6), texts=texts).metrics
    assert actor.updates == [[4, 5]] * 6
    assert 0.5 < metrics["loss/ptx"] < 1.3863, "below ln 4: it is of all six updates"


def test_the_actor_waits_during_the_critics_warm_up() -> None:
    """By hand, with weights that stay: values 0, returns 0 and 1 on two tokens each."""
    config = config_of(2, num_steps=2, advantage="gae", lam=1.0, critic_warmup_steps=1)
    actor = actor_of(config, is_frozen=True)
    critic = PlainLearner(Bias(), config.train, name="critic", is_frozen=True)
    steps = [samples_of([1, 2], [2, 1]) for _ in range(2)]
    outcome = run_loop(config, actor, *steps, critic=LocalCritic(critic))
    assert critic.steps == [0, 1] and actor.steps == [1], "algorithm.critic_warmup_steps"
    first, second = outcome.metrics
    assert "loss/actor" not in first
    assert second["loss/actor"] == pytest.approx(-0.5), "-A, which is the return where values are 0"
    for metrics in (first, second):
        assert metrics["loss/critic"] == pytest.approx(0.25)  # ½·(0 - R)²
        assert metrics["loss/value"] == 0.0 and metrics["loss/return"] == pytest.approx(0.5)
        assert metrics["loss/explained_variance"] == pytest.approx(0.0), "no better than a constant"


@pytest.mark.parametrize("aggregation, mean", [("token_mean", 1 / 8), ("sequence_mean", 1 / 3)])
def test_10_objectives_weigh_what_they_are_a_mean_over(aggregation: str, mean: float) -> None:
    """Responses of 1, 2 and 5 tokens in separate mini-batches, of which the first has a return of 1 and
    the others 0, with values of 0 and weights that stay.
    """
    config = config_of(
        3, advantage="gae", lam=1.0, aggregation=aggregation, mini_batches=3, updates_per_batch=2
    )
    critic = PlainLearner(Bias(), config.train, name="critic", is_frozen=True)
    samples = [
        make_sample([1] * length, prompt=make_prompt([0]), group_id=i, score=score)
        for i, (length, score) in enumerate([(1, 1.0), (2, 0.0), (5, 0.0)])
    ]
    actor = actor_of(config, is_frozen=True)
    [metrics] = run_loop(config, actor, scored(samples), critic=LocalCritic(critic)).metrics
    assert metrics["loss/actor"] == pytest.approx(-mean)
    assert metrics["loss/critic"] == pytest.approx(0.5 * mean)
    assert metrics["loss/return"] == pytest.approx(1 / 8), "a mean over tokens, whatever the objective's is"
