"""`rollout.engine_args`: what vLLM takes, and what is refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.config.base import ConfigError
from rayrlhf.config.rollout import GPU_BATCH_TOKENS, SET_BY_KEYS, EngineConfig, RolloutConfig
from rayrlhf.rollout import engine_arguments
from rayrlhf.rollout.engine_arguments import check_engine_args, vllm_arguments


def check(*, on_gpu: bool = True, **arguments: Any) -> None:
    check_engine_args(SimpleNamespace(rollout=EngineConfig(engine_args=arguments)), on_gpu=on_gpu)


def test_arguments_are_those_of_the_installed_vllm() -> None:
    known = vllm_arguments()
    assert known["max_num_batched_tokens"] == "int | None" and len(known) > 100
    assert set(SET_BY_KEYS) <= set(known), "vLLM has renamed one"


def test_arguments_of_vllm_pass() -> None:
    check()
    check(max_num_batched_tokens=16384, kv_cache_dtype="fp8", cpu_offload_gb=4, block_size=None)
    check(speculative_config={"method": "ngram", "num_speculative_tokens": 3}, enable_prefix_caching=False)
    check(on_gpu=False, block_size=32)
    check_engine_args(SimpleNamespace(), on_gpu=True)  # a job without engines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"max_num_batch_tokens": 1},
            ["engine_args.max_num_batch_tokens", "did you mean max_num_batched_tokens"],
        ),
        ({"zzz": 1}, ["engine_args.zzz", "an argument of vLLM's EngineArgs", "vllm serve --help"]),
        ({"max_num_batched_tokens": "16k"}, ["16k (str)", "int or None"]),
        ({"max_num_batched_tokens": True}, ["True (bool)", "int or None"]),
        ({"enable_prefix_caching": 1}, ["1 (int)", "bool or None"]),
    ],
)
def test_what_vllm_would_refuse_is_refused_at_once(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        check(**arguments)
    for word in words:
        assert word in str(raised.value)


def test_what_cannot_be_on_cpus_is_refused_there() -> None:
    check(enable_chunked_prefill=True)
    with pytest.raises(ConfigError, match="enable_chunked_prefill"):
        check(on_gpu=False, enable_chunked_prefill=True)


def test_without_vllm_only_the_engines_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_arguments, "vllm_arguments", dict)
    check(zzz=1)


@pytest.mark.parametrize("section", [EngineConfig, RolloutConfig])
@pytest.mark.parametrize("name", SET_BY_KEYS)
def test_what_follows_from_a_key_is_answered_with_the_key(section: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"engine_args.{name}") as raised:
        section(engine_args={name: 1})
    assert SET_BY_KEYS[name] in str(raised.value)


def test_the_plan_counts_what_takes_memory() -> None:
    assert EngineConfig().batch_tokens == GPU_BATCH_TOKENS
    given = EngineConfig(engine_args={"max_num_batched_tokens": 16384, "kv_cache_dtype": "fp8_e5m2"})
    assert given.batch_tokens == 16384 and given.cache_is_fp8 and not EngineConfig().cache_is_fp8
