"""`rollout`: engines, sampling and weight sync."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rayrlhf.config.base import (
    Count,
    Meanings,
    NaturalNumber,
    NonNegativeNumber,
    PositiveNumber,
    Problem,
    Section,
    Wanted,
)
from rayrlhf.config.model import Dtype
from rayrlhf.config.user_code import CodeLimits

ClassName = Annotated[
    str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$"), Wanted("module:Class or path/to/file.py:Class")
]


class EnvironmentConfig(CodeLimits):
    environment: ClassName
    """Your Python class with reset(row) and step(response): `module:Class` or `path/file.py:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor; every episode has its own instance."""
    max_turns: Count = 8
    """Responses of the policy in an episode; after the last one it ends, done or not."""
    max_response_tokens: Count = 1024
    """Limit on everything after the opening messages, in tokens: responses and observations of all turns."""
    timeout_seconds: PositiveNumber = 120
    """Deadline of an episode, generation included; its sample is then dropped and counted."""
    num_replicas: Count = 1
    """Serve replicas that run episodes; each runs many at once."""


def _minimum_fits(sampling: SamplingConfig) -> Problem | None:
    if sampling.min_new_tokens <= sampling.max_new_tokens:
        return None
    return Problem(
        "min_new_tokens",
        got=f"{sampling.min_new_tokens} with max_new_tokens={sampling.max_new_tokens}",
        wanted=f"at most max_new_tokens, {sampling.max_new_tokens}",
        fix="lower min_new_tokens or raise max_new_tokens",
    )


class SamplingConfig(Section):
    temperature: NonNegativeNumber = 1.0
    """Sampling temperature; 0 is greedy (not allowed for training samples)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Keep the k likeliest tokens; -1 keeps all."""
    min_new_tokens: NaturalNumber = 0
    """No stop token before this many tokens."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    stop: list[str] = Field(default_factory=list)
    """Stop strings or special tokens, in addition to end of text and the chat template's end of turn."""

    checks = (_minimum_fits,)


def _minimum_fits_its_own_maximum(sampling: EvalSamplingConfig) -> Problem | None:
    return None if sampling.max_new_tokens is None else _minimum_fits(sampling)


class EvalSamplingConfig(SamplingConfig):
    """Sampling of evaluation: greedy by default, with the rollout's length limit and stop strings."""

    temperature: NonNegativeNumber = 0.0
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: Count | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Longest response, in tokens; null is rollout.sampling's."""
    stop: list[str] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Stop strings, in addition to the model's own end of text; null is rollout.sampling's."""

    checks = (_minimum_fits_its_own_maximum,)

    def completed(self, rollout: SamplingConfig) -> SamplingConfig:
        """The same with null fields filled in from `rollout`."""
        limits = {"max_new_tokens": rollout.max_new_tokens, "stop": rollout.stop}
        return SamplingConfig.model_validate(limits | self.model_dump(exclude_none=True))


LoraSync = Annotated[
    Literal["auto", "adapter", "merged"],
    Meanings(
        {
            "auto": "adapter where the engines can take it; the log says which, and why",
            "adapter": "engines hold the base model, and a push sends the adapters alone",
            "merged": "a push sends all weights, with the adapters merged into them",
        }
    ),
]


RunningRequests = Annotated[
    Literal["recompute", "keep"],
    Meanings(
        {
            "recompute": "their keys and values are computed again with the new weights",
            "keep": "they go on with what the old weights computed, which costs nothing",
        }
    ),
]


class WeightSyncConfig(Section):
    backend: Literal["auto", "nccl", "ipc", "gloo", "object_store"] = "auto"
    """Weight transfer: nccl between GPUs, ipc within shared slots, gloo or object_store through hosts."""
    bucket_bytes: Count = 134_217_728
    """Size of one transfer, in bytes."""
    running: RunningRequests = "recompute"
    """What a push does to requests that an engine computes meanwhile (with rollout.max_staleness)."""
    lora: LoraSync = "auto"
    """What a push sends with model.lora: a few megabytes of adapters, or all weights."""
    timeout_seconds: PositiveNumber = 300
    """Deadline for all engines to hold the new weights."""
    verify: Count | None = None
    """Compare a checksum per tensor between trainer and engines after every n-th push; null never does."""
    logprob_diff_alarm: PositiveNumber | None = 0.05
    """Warn when rollout/logprob_diff_mean leaves 0 to this (nats); null never warns."""
    max_logprob_jump: PositiveNumber | None = 0.1
    """Stop if a push raises rollout/logprob_diff_mean above this (nats) and tenfold; null never stops."""


def _only_the_pool_oversamples(rollout: RolloutConfig) -> Problem | None:
    if rollout.oversampling == 1 or rollout.max_staleness is not None:
        return None
    return Problem(
        "oversampling",
        got=f"{rollout.oversampling:g} with max_staleness=null",
        wanted="1: the synchronous loop waits for every response of a step",
        fix="set rollout.max_staleness (for example to 1), or remove rollout.oversampling",
    )


GPU_BATCH_TOKENS = 8_192  # vLLM's own default of an engine that is not its `LLM` is 2,048
# Arguments of vLLM that follow from keys, and these keys; "" if nothing can be chosen.
SET_BY_KEYS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "rollout.dtype",
    "seed": "run.seed",
    "max_model_len": "the lengths of prompts and responses",
    "max_num_seqs": "rollout.max_concurrent_requests",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.kv_cache_bytes",
    "enable_sleep_mode": "rollout.sleep",
    "enable_return_routed_experts": "rollout.router_replay",
    "enable_lora": "model.lora",
    "max_loras": "model.lora",
    "max_lora_rank": "model.lora.rank",
    "lora_target_modules": "model.lora.target_modules",
    "distributed_executor_backend": "placement",
    "data_parallel_size": "rollout.num_engines",
    "logprobs_mode": "",
    "worker_extension_cls": "",
    "weight_transfer_config": "",
    "additional_config": "",
}


def _keys_are_not_bypassed(rollout: EngineConfig) -> Problem | None:
    for name, value in rollout.engine_args.items():
        if (key := SET_BY_KEYS.get(name)) is None:
            continue
        return Problem(
            f"engine_args.{name}",
            got=f"{value}",
            wanted="arguments that rayrlhf does not set itself",
            fix=f"remove it: it follows from {key}" if key else "remove it: training depends on its value",
        )
    return None


class EngineConfig(Section):
    """Engines and sampling: the fields of every job that generates."""

    num_engines: Count = 1
    """vLLM engines, each a Serve replica."""
    tensor_parallel: Count = 1
    """GPUs of each engine, which have to be on one node."""
    group_size: Count = 1
    """Samples per prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    kv_cache_bytes: Count = 1_073_741_824
    """Key-value cache of a CPU engine, in bytes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of its GPU's memory that an engine takes; left out, less if it shares the GPU with a trainer."""
    max_concurrent_requests: Count = 256
    """Requests that an engine processes at once."""
    num_threads: Count | None = None
    """Threads of a CPU engine; the node's cores divided by its engines when left out."""
    dtype: Dtype = "auto"
    """Dtype of the engines' weights; auto is the model's."""
    timeout_seconds: PositiveNumber = 600
    """Deadline of one generation request, retries included."""
    start_timeout_seconds: PositiveNumber = 600
    """Deadline for all engines to start."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Other arguments of vLLM's EngineArgs, for example {max_num_batched_tokens: 16384}."""

    checks = (_keys_are_not_bypassed,)

    @property
    def batch_tokens(self) -> int:
        """Most tokens that a GPU engine computes in one step."""
        return self.engine_args.get("max_num_batched_tokens") or GPU_BATCH_TOKENS

    @property
    def cache_is_fp8(self) -> bool:
        return f"{self.engine_args.get('kv_cache_dtype')}".startswith("fp8")


def _asleep_engines_have_no_work(rollout: RolloutConfig) -> Problem | None:
    if rollout.sleep is not True or rollout.max_staleness is None:
        return None
    return Problem(
        "sleep",
        got=f"true with max_staleness={rollout.max_staleness}",
        wanted="false: these engines generate while the trainers train",
        fix="remove rollout.sleep, or rollout.max_staleness",
    )


class RolloutConfig(EngineConfig):
    group_size: Count = 1
    """Samples per prompt; left out, 8 for estimators that compare them (grpo, rloo, …), else 1."""
    prompts_per_step: Count = 64
    """Prompts per step, over all workers."""
    sampling: SamplingConfig = SamplingConfig()
    """How training responses are sampled."""
    max_staleness: NaturalNumber | None = None
    """Policy versions that rollouts may be ahead of training; null alternates the two (synchronous)."""
    oversampling: Annotated[float, Field(ge=1)] = 1.0
    """Groups in flight per group needed: a step takes those that finish first, the others continue (> 1)."""
    environment: EnvironmentConfig | None = None
    """Multi-turn episodes with your environment; null is one response per prompt."""
    sleep: Annotated[bool | Literal["auto"], Wanted("true, false or auto")] = "auto"
    """Engines release their memory while trainers work; auto: those that share GPUs with a trainer."""
    router_replay: bool = False
    """Train with the experts that the engine chose for each token (mixtures of experts, arXiv 2510.11370)."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """How new weights reach the engines."""

    checks = (*EngineConfig.checks, _only_the_pool_oversamples, _asleep_engines_have_no_work)

    @property
    def max_response_tokens(self) -> int:
        """Longest response of a training sample, in tokens; with an environment all turns together."""
        return self.environment.max_response_tokens if self.environment else self.sampling.max_new_tokens
