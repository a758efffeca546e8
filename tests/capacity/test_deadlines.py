"""Deadlines by hand: an H100's engine of Llama-3-8B, whose cache holds 13 sequences of 33k tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.capacity import deadlines
from rayrlhf.capacity.deadlines import Rollout, rollout_of, with_deadlines
from rayrlhf.config.base import ConfigError
from rayrlhf.config.policy import PolicyRunConfig
from tests.integration.policy_runs import tiny_run
from tests.tiny_model import make_tiny_model

CACHE_TOKENS = int(54.9 * 2**30) // (128 * 2**10)  # 54.9 GiB, 128 KiB a token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def long_run(
    folder: Path, model: str, *, train: dict[str, Any] | None = None, **rollout: Any
) -> PolicyRunConfig:
    return tiny_run(
        folder,
        model,
        rollout={
            "prompts_per_step": 512,
            "group_size": 8,
            "num_engines": 8,
            "max_concurrent_requests": 512,
            "sampling": {"max_new_tokens": 32_768},
            **rollout,
        },
        data={"max_prompt_tokens": 1024},
        train={"max_tokens_per_micro_batch": 40_000, **(train or {})},
    )


def test_rounds_of_an_engine(tmp_path: Path, model: str) -> None:
    found = rollout_of(long_run(tmp_path, model), CACHE_TOKENS)
    assert found == Rollout(requests=512, at_once=13, tokens=32_768)
    assert found.rounds == 40
    assert f"{found}" == "512 responses of up to 32,768 tokens per engine, 13 at once"
    assert rollout_of(long_run(tmp_path, model), None).at_once == 512, "as many as are sent to it"
    assert rollout_of(long_run(tmp_path, model), 10).at_once == 1
    ahead = rollout_of(long_run(tmp_path, model, max_staleness=1, oversampling=1.5), CACHE_TOKENS)
    assert ahead.requests == 768


def test_deadlines_that_were_left_out_follow_from_the_rollout(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "_budget", lambda *_, **__: None)
    config = long_run(tmp_path, model, max_concurrent_requests=13)
    changed, lines = with_deadlines(config, on_gpu=True)
    # 40 rounds x 32,768 tokens x 0.03 s = 39,321.6 s, in whole minutes; collectives wait two minutes more.
    assert changed.rollout.timeout_seconds == 39_360
    assert changed.train.collective_timeout_seconds == 39_480
    assert lines == [
        "rollout.timeout_seconds=39360, as it is not set: 512 responses of up to 32,768 tokens per engine, "
        "13 at once",
        "train.collective_timeout_seconds=39480, as it is not set: ranks wait for each other's rollouts and "
        "for engines that start",
    ]


def test_short_runs_keep_the_defaults_and_say_nothing(tmp_path: Path, model: str) -> None:
    config = tiny_run(tmp_path, model)
    changed, lines = with_deadlines(config, on_gpu=False)
    assert lines == []
    assert changed.rollout == config.rollout and changed.train == config.train
    assert config.train.collective_timeout_seconds > config.rollout.timeout_seconds


def test_an_engine_that_loads_long_may_start_long(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70B in bf16 over 8 slots: 17.6 GB each, 1,410 s at 10 s per GB."""

    engine = SimpleNamespace(device={"weights": 17_637_500_000})
    budget = SimpleNamespace(tokens_in_flight=None, roles={"rollout": engine})
    monkeypatch.setattr(deadlines, "_budget", lambda *_, **__: budget)
    config = tiny_run(tmp_path, model, rollout={"tensor_parallel": 8})
    changed, lines = with_deadlines(config, on_gpu=True)
    assert changed.rollout.start_timeout_seconds == 1440
    assert changed.train.collective_timeout_seconds == 1560
    assert lines[0] == "rollout.start_timeout_seconds=1440, as it is not set: an engine loads 141 GB"


def test_a_deadline_that_no_engine_meets_is_refused(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "_budget", lambda *_, **__: None)
    config = long_run(tmp_path, model, timeout_seconds=600, max_concurrent_requests=13)
    with pytest.raises(ConfigError) as refused:
        with_deadlines(config, on_gpu=True)
    [problem] = refused.value.problems
    assert problem.path == "rollout.timeout_seconds"
    assert "600 with 512 responses of up to 32,768 tokens per engine, 13 at once" in problem.got
    assert problem.wanted == "at least 2622: 40 x 32,768 tokens at 500 per second"
    enough = long_run(tmp_path, model, timeout_seconds=2700, max_concurrent_requests=13)
    assert with_deadlines(enough, on_gpu=True)[0].rollout.timeout_seconds == 2700


def test_ranks_wait_for_each_others_rollouts(tmp_path: Path, model: str) -> None:
    config = tiny_run(
        tmp_path, model, rollout={"timeout_seconds": 900}, train={"collective_timeout_seconds": 60}
    )
    with pytest.raises(ConfigError, match=r"train.collective_timeout_seconds") as refused:
        with_deadlines(config, on_gpu=False)
    assert "at least 900" in refused.value.problems[0].wanted
    quick = tiny_run(tmp_path, model, train={"collective_timeout_seconds": 60})
    assert with_deadlines(quick, on_gpu=False)[0].train.collective_timeout_seconds == 60
