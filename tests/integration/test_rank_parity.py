"""Two ranks, with groups scattered over them by the balancer, learn what one rank learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.samples import Sample
from tests.integration.policy_runs import tiny_run
from tests.samples import make_prompt, make_sample

if TYPE_CHECKING:
    from rayrlhf.algorithms.metrics import Metrics
    from rayrlhf.policy.run_state import Run

NUM_STEPS = 3
NUM_GROUPS, GROUP_SIZE = 5, 4

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def samples_of(step: int) -> list[Sample]:
    """What all ranks together have collected: responses of 2 to 40 tokens, some groups much longer than
    others, one of them with a tool's tokens in the middle.
    """
    rng = np.random.default_rng([17, step])
    samples = []
    for group in range(NUM_GROUPS):
        prompt = make_prompt(rng.integers(8, 264, size=18).tolist(), row_id=group)
        for index in range(GROUP_SIZE):
            length = int(rng.integers(2, 9 + 8 * group))
            mask = [1] * length
            if group == 3 and length > 6:
                mask[2:5] = [0, 0, 0]
            samples.append(
                make_sample(
                    rng.integers(8, 264, size=length).tolist(),
                    prompt=prompt,
                    group_id=100 * step + group,
                    sample_index=index,
                    rollout_logprobs=rng.uniform(-7.0, -4.0, size=length).tolist(),
                    loss_mask=mask,
                    score=float(rng.normal()),
                )
            )
    return samples


def scripted_run(config: PolicyRunConfig) -> Run:
    """A run with the models of `config`, whose rollouts are `samples_of` and which starts no engine."""
    from rayrlhf.policy.actor_critic import Ref, make_actor, make_critic, make_kl_controller, make_reference
    from rayrlhf.policy.push_check import MismatchAlarm, PushCheck
    from rayrlhf.policy.rollouts import Rewards, StepGroups
    from rayrlhf.policy.run_state import Run
    from rayrlhf.train.collectives import Ranks

    class Scripted(Run):
        """Steps without engines, reports and checkpoints."""

        history: list[dict[str, float]]

        def restore(self) -> None: ...

        def evaluate(self, when: Any) -> Any: ...

        def steps(self) -> Iterator[int]:
            yield from range(NUM_STEPS)

        def start_training(self) -> None: ...

        def push_weights(self, version: int) -> None: ...

        def end_step(self, groups: StepGroups, samples: Sequence[Sample], metrics: Metrics) -> None:
            self.history.append(self.step_metrics | metrics.results())
            self.step_metrics = {}

        def finish(self) -> Any:
            return self.history

    class Collected:
        """Rank 0 has collected one group, the last rank all others."""

        def next(self, step: int) -> list[Sample]:
            everything = samples_of(step)
            if ranks.world_size == 1:
                return everything
            return [s for s in everything if (s.group_id % 100 > 0) == (ranks.rank > 0)]

        def drain_restarted(self) -> int:
            return 0

        def close(self) -> None: ...

    ranks = Ranks()
    actor = make_actor(config)
    temperature = config.rollout.sampling.temperature
    client: Any = SimpleNamespace(drain_unverified=lambda: 0, check=lambda failed, total: None)
    combiner: Any = SimpleNamespace(combine=lambda samples, sum_over_ranks: samples)
    phases: Any = SimpleNamespace(phase=lambda name: nullcontext())
    nothing: Any = None
    run = Scripted(
        config=config,
        ranks=ranks,
        progress=phases,
        streams=nothing,
        prompts=nothing,
        collector=nothing,
        rollouts=Collected(),
        rewards=Rewards(client, combiner),
        actor=actor,
        critic=make_critic(config) if config.needs_critic else None,
        ref=Ref(make_reference(config, actor), temperature) if config.needs_ref else None,
        kl=make_kl_controller(config.algorithm),
        weights=nothing,
        weight_route="",
        colocation=nothing,
        push_check=PushCheck(config.model.path, limit=None),  # these log-probabilities are no engine's
        mismatch_alarm=MismatchAlarm(limit=None),
        random_states=nothing,
    )
    run.history = []
    return run


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    from rayrlhf.policy.loop import policy_loop

    torch.set_num_threads(1)
    config: PolicyRunConfig = arguments["config"]
    run = scripted_run(config)
    steps: Any = policy_loop(run)
    actor = run.actor.learner
    on_this_rank = run.ranks.rank == 0
    state = actor.state_dict(actor.module.causal_lm, on_this_rank=on_this_rank)
    weights = {f"actor.{name}": tensor.numpy() for name, tensor in state.items()}
    if config.needs_critic:
        critic: Any = run.critic
        state = critic.learner.state_dict(critic.learner.module, on_this_rank=on_this_rank)
        weights |= {f"critic.{name}": tensor.numpy() for name, tensor in state.items()}
    history = [
        {key: value for key, value in metrics.items() if key.startswith(("loss", "kl"))} for metrics in steps
    ]
    return {
        "history": history,
        "imbalance": [metrics["data/imbalance"] for metrics in steps],
        "prefix_share": [metrics["data/prefix_share"] for metrics in steps],
        "weights": weights,
    }


def run_on(num_workers: int, folder: Path, config: PolicyRunConfig) -> dict[str, Any]:
    result = TorchTrainer(
        train,
        train_loop_config={"config": config},
        torch_config=TorchConfig(backend="gloo", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"ranks-{num_workers}", storage_path=str(folder)),
    ).fit()
    assert result.return_value is not None
    return result.return_value


GRPO = {
    "critic": None,
    "algorithm": {
        "advantage": "grpo",
        "kl_coef": 0.05,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "mini_batches": 2,
        "updates_per_batch": 2,
        "rollout_correction": {"mode": "truncate", "high": 2.0},
    },
    "train": {"num_steps": NUM_STEPS, "zero_stage": 2},
}
PPO = {
    "algorithm": {"advantage": "gae", "kl_coef": 0.05, "mini_batches": 2, "aggregation": "sequence_mean"},
    "train": {"num_steps": NUM_STEPS, "zero_stage": 3},
}


@pytest.mark.parametrize(
    "changes", [pytest.param(GRPO, marks=pytest.mark.long), PPO], ids=["grpo", "ppo with critic"]
)
def test_two_ranks_equal_one(tmp_path: Path, tiny_model: str, changes: dict[str, Any]) -> None:
    changes = {**changes, "train": {**changes["train"], "max_tokens_per_micro_batch": 128, "lr": 1e-3}}
    config = tiny_run(tmp_path, tiny_model, rollout={"group_size": GROUP_SIZE}, **changes)
    one, two = run_on(1, tmp_path, config), run_on(2, tmp_path, config)
    assert max(two["imbalance"]) < 0.1, "the balancer has moved samples from the rank with four groups"
    check_equal(one, two)


@pytest.mark.parametrize(
    ("changes", "zero_stage"),
    [
        pytest.param(GRPO, 0, marks=pytest.mark.long),
        pytest.param(GRPO, 2, marks=pytest.mark.long),
        (PPO, 3),
    ],
    ids=["grpo stage 0", "grpo stage 2", "ppo stage 3"],
)
def test_two_ranks_that_share_prompts_equal_one_that_does_not(
    tmp_path: Path, tiny_model: str, changes: dict[str, Any], zero_stage: int
) -> None:
    def config(*, share_prefixes: bool) -> PolicyRunConfig:
        train = {"max_tokens_per_micro_batch": 160, "lr": 1e-3, "zero_stage": zero_stage}
        sections = {**changes, "train": {**changes["train"], **train, "share_prefixes": share_prefixes}}
        return tiny_run(tmp_path, tiny_model, rollout={"group_size": GROUP_SIZE}, **sections)

    one = run_on(1, tmp_path, config(share_prefixes=False))
    two = run_on(2, tmp_path, config(share_prefixes=True))
    assert set(one["prefix_share"]) == {0.0} and min(two["prefix_share"]) > 0.2
    check_equal(one, two)


def check_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    for alone, together in zip(one["history"], two["history"], strict=True):
        assert alone.keys() == together.keys()
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
    for name, wanted in one["weights"].items():
        distance = np.linalg.norm(two["weights"][name] - wanted) / max(np.linalg.norm(wanted), 1e-12)
        assert distance < 1e-5, f"{name}: relative distance {distance:.1e}"
