"""Defaults and cautions that decide what a policy run computes, without a model."""

from __future__ import annotations

import pytest

from rayrlhf.config.cautions import cautions
from rayrlhf.config.chains import RejectionSamplingConfig
from rayrlhf.config.generate import GenerateRunConfig
from rayrlhf.config.parse import dump_resolved, load_config
from rayrlhf.config.policy import PolicyRunConfig
from tests.config.conftest import Load, Problems


def test_8_every_filter_is_reported_with_its_reason(problems: Problems) -> None:
    found = problems(
        "rollout.sampling.top_p=0.9", "rollout.sampling.top_k=50", "rollout.sampling.min_new_tokens=2"
    )
    assert set(found) == {f"rollout.sampling.{key}" for key in ("top_p", "top_k", "min_new_tokens")}
    assert all("log-probabilities" in problem.wanted for problem in found.values())
    assert all("eval.sampling" in problem.fix for problem in found.values())


def test_8_what_filters_nothing_is_taken(load: Load) -> None:
    assert load("rollout.sampling={top_p: 1.0, top_k: 0, temperature: 0.7}").rollout.sampling.top_k == 0


@pytest.mark.parametrize("schema", [GenerateRunConfig, RejectionSamplingConfig])
def test_8_responses_without_a_log_probability_ratio_may_be_filtered(schema: type) -> None:
    """Batch inference, and chains, whose training stages take the texts alone."""
    tree = {
        "run": {"name": "a"},
        "model": {"path": "models/tiny"},
        "data": {"train": "a.jsonl"},
        "rollout": {"group_size": 2, "sampling": {"top_p": 0.9, "top_k": 50, "min_new_tokens": 2}},
        "reward": {"sources": [{"type": "function", "function": "a:b"}]},
    }
    assert schema.model_validate(tree).rollout.sampling.top_p == 0.9


def test_14_gspo_has_the_papers_range_by_default(load: Load, tmp_path_factory) -> None:
    """And the resolved config says it; what is given stays."""
    config = load("algorithm.policy_loss=gspo")
    algorithm = config.algorithm
    assert (algorithm.aggregation, algorithm.clip_low, algorithm.clip_high) == ("sequence_mean", 3e-4, 4e-4)
    resolved = tmp_path_factory.mktemp("run") / "config.yaml"
    resolved.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(PolicyRunConfig, [str(resolved)]) == config
    given = load("algorithm.policy_loss=gspo", "algorithm.clip_low=0.001").algorithm
    assert (given.clip_low, given.clip_high) == (0.001, 4e-4)
    ppo = load().algorithm
    assert (ppo.aggregation, ppo.clip_low, ppo.clip_high) == ("token_mean", 0.2, 0.2)


def test_14_an_unrelated_error_does_not_blame_what_gspo_would_get(problems: Problems) -> None:
    assert problems("algorithm.policy_loss=gspo", "train.lr=fast").keys() == {"train.lr"}


def test_14_ppos_range_on_sequences_is_a_caution(load: Load) -> None:
    [caution] = cautions(load("algorithm.policy_loss=gspo", "algorithm.clip_high=0.2"))
    assert "algorithm.clip_low=0.0003" in caution and "clip_high=0.2" in caution and "4e-4" in caution
    assert cautions(load("algorithm.policy_loss=gspo")) == cautions(load()) == []


def test_17_staleness_without_correction_is_a_caution(load: Load) -> None:
    [caution] = cautions(load("rollout.max_staleness=2"))
    assert "rollout.max_staleness=2" in caution and "algorithm.rollout_correction" in caution
    assert cautions(load("rollout.max_staleness=0")) == []
    assert cautions(load("rollout.max_staleness=2", "algorithm.rollout_correction={}")) == []


def test_15_evaluations_take_over_the_rollouts_limit_and_stops(load: Load) -> None:
    rollout = "rollout.sampling={max_new_tokens: 4096, stop: ['###'], temperature: 0.7}"
    room = "train.max_tokens_per_micro_batch=8192"
    sampling = load(rollout, room).eval_sampling
    assert (sampling.max_new_tokens, sampling.stop) == (4096, ["###"])
    assert sampling.temperature == 0.0, "greedy stays the default"
    own = load(rollout, room, "eval.sampling={max_new_tokens: 16, stop: [], top_p: 0.9, temperature: 0.5}")
    sampling = own.eval_sampling
    assert (sampling.max_new_tokens, sampling.stop, sampling.top_p) == (16, [], 0.9)
    assert sampling.temperature == 0.5


def test_6_the_papers_rewards_need_no_range(load: Load) -> None:
    dynamic = load("algorithm.dynamic_sampling={}", "rollout.group_size=2").algorithm.dynamic_sampling
    assert dynamic is not None and (dynamic.low, dynamic.high, dynamic.source) == (None, None, None)
    one_sided = load("algorithm.dynamic_sampling={low: 0.1}", "rollout.group_size=2")
    assert one_sided.algorithm.dynamic_sampling is not None


def test_6_rewards_may_be_normalized(load: Load) -> None:
    """Groups are judged by raw rewards, which mean the same at every step."""
    load(
        "algorithm.dynamic_sampling={}",
        "rollout.group_size=2",
        "reward.sources=[{type: model, path: a, normalize: true}]",
    )
