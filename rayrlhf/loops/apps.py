"""The run's Serve apps: rollout engines, reward sources, and the reference when it is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rayrlhf.config.model import ModelConfig
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.rollout import EngineConfig
from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.data.chat import read_chat_template
from rayrlhf.hub.access import offline_variable
from rayrlhf.loops.checks import Prepared, log_of
from rayrlhf.loops.job import PolicyJob, RewardApp
from rayrlhf.loops.reporting import ToBoard
from rayrlhf.models.load import resolve_dtype
from rayrlhf.placement.apply import Slots
from rayrlhf.reward.functions import function_deployment, hosted_function
from rayrlhf.reward.model import model_deployment
from rayrlhf.reward.reading import Asked
from rayrlhf.reward.remote import remote_deployment
from rayrlhf.reward.verifiable import verifiable_deployment
from rayrlhf.rollout.engine import EngineSettings, rollout_deployment
from rayrlhf.rollout.environments import NAME, EnvironmentSetup, environment_deployment
from rayrlhf.rollout.scorer import scorer_deployment
from rayrlhf.train.served import reference_deployment
from rayrlhf.usercode import UserCode

KV_BLOCK_TOKENS = 32
PREFILL_TOKENS = 4096  # of a CPU engine, per engine step


def run_apps(job: PolicyJob, slots: Slots, prepared: Prepared, *, threads: int) -> dict[str, Any]:
    """App name -> bound deployment, the rollout app first."""
    config = job.config
    apps: dict[str, Any] = {
        job.rollout_app: rollout_deployment(
            engine_settings(
                config.model,
                config.rollout,
                seed=config.run.seed,
                max_model_tokens=max_model_tokens(config),
                weight_hub=job.weight_hub,
                on_gpu=slots.have_gpus,
                threads=threads,
                sleeps=config.engines_sleep,
            ),
            slots,
            num_engines=config.rollout.num_engines,
            max_requests=config.rollout.max_concurrent_requests,
        )
    }
    apps |= reward_apps(
        config.reward,
        job.reward_apps,
        prepared.reward_functions,
        asked=Asked(config.model.path, config.data, config.model.trust_remote_code),
        label_key=config.data.label_key,
        slots=slots,
        run_path=config.run.path,
        say=ToBoard(job.board),
    )
    if prepared.environment is not None:
        setup = EnvironmentSetup(
            code=prepared.environment,
            rollout=config.rollout,
            data=config.data,
            tokenizer_path=config.model.path,
            trust_remote_code=config.model.trust_remote_code,
            chat_template=read_chat_template(config.data),
            rollout_app=job.rollout_app,
            log=log_of(config.run.path, NAME),
            say=ToBoard(job.board),
        )
        apps[job.environment_app] = environment_deployment(setup)
    if config.ref_is_served:
        apps[job.ref_app] = _reference(config, slots, threads=threads)
    return apps


def _reference(config: PolicyRunConfig, slots: Slots, *, threads: int) -> Any:
    assert config.ref is not None
    path = config.ref.path or config.model.path
    if config.ref.engine == "packed":
        return reference_deployment(
            config.model,
            path,
            chunk_tokens=config.train.logprob_chunk_tokens,
            num_replicas=config.ref.num_replicas,
            slots=slots,
        )
    settings = engine_settings(
        config.model.model_copy(update={"path": path}),
        config.rollout.model_copy(update={"tensor_parallel": config.ref.tensor_parallel}),
        seed=config.run.seed,
        max_model_tokens=max_model_tokens(config) + 1,  # one is generated
        weight_hub=None,
        on_gpu=slots.have_gpus,
        threads=threads,
    )
    return scorer_deployment(settings, slots, role="ref", num_replicas=config.ref.num_replicas)


def reward_apps(
    reward: RewardConfig,
    names: Sequence[RewardApp],
    functions: dict[int, UserCode],
    *,
    asked: Asked,
    label_key: str | None,
    slots: Slots,
    run_path: Path | str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """App name -> bound deployment of every reward source that has one. What functions print goes into the
    run's folder, its first lines to `say`.
    """
    apps: dict[str, Any] = {}
    for index, (source, (name, _, app)) in enumerate(zip(reward.sources, names, strict=True)):
        match source.type:
            case "function":
                apps[app] = function_deployment(
                    hosted_function(functions[index], source, reward.timeout_seconds),
                    label_key=label_key,
                    num_replicas=source.num_replicas,
                    name=name,
                    log=log_of(run_path, f"reward-{name}"),
                    say=say,
                )
            case "model":
                apps[app] = model_deployment(
                    source,
                    role=f"reward:{index}",
                    asked=asked,
                    slots=slots,
                )
            case "remote":
                apps[app] = remote_deployment(source, label_key=label_key)
            case "math" | "reasoning_gym":
                apps[app] = verifiable_deployment(source, label_key=label_key)
            case "environment":  # its rewards come with the samples
                pass
    return apps


def engine_settings(
    model: ModelConfig,
    rollout: EngineConfig,
    *,
    seed: int,
    max_model_tokens: int,
    weight_hub: str | None,
    on_gpu: bool,
    threads: int,
    sleeps: bool = False,
) -> EngineSettings:
    """Without a `weight_hub` the engines keep the weights of the checkpoint. `sleeps`: they give their memory
    up by turns.
    """
    engine_args: dict[str, Any] = {
        "model": model.path,
        "trust_remote_code": model.trust_remote_code,
        "max_model_len": max_model_tokens,
        "max_num_seqs": rollout.max_concurrent_requests,
        "seed": seed,
        "disable_log_stats": True,
        # What the engine reports must be what the trainer computes: log-probabilities at the sampling
        # temperature.
        "logprobs_mode": "processed_logprobs",
    }
    env_vars = {
        **offline_variable(),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    dtype = rollout.dtype if rollout.dtype != "auto" else model.dtype
    if on_gpu:
        engine_args |= {
            "dtype": "bfloat16" if dtype == "auto" else dtype,
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "enable_sleep_mode": sleeps,
        }
        if rollout.tensor_parallel > 1:
            # The workers go on the slots that placement.child names in the environment.
            engine_args |= {
                "tensor_parallel_size": rollout.tensor_parallel,
                "distributed_executor_backend": "ray",
            }
    else:
        engine_args |= {
            "dtype": str(resolve_dtype(dtype, torch.device("cpu"))).removeprefix("torch."),
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": rollout.kv_cache_bytes,
            "block_size": KV_BLOCK_TOKENS,
            # A prefill in pieces kills vLLM's CPU engine when the request has a seed (it rewinds a generator
            # that cannot): prompts go in whole.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(PREFILL_TOKENS, max_model_tokens),
        }
        env_vars |= {
            "OMP_NUM_THREADS": str(rollout.num_threads or threads),
            "KMP_BLOCKTIME": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" binds every engine of a node to the same core
            "TORCH_COMPILE_DISABLE": "1",  # saves a 20 s compilation at the first request
        }
    return EngineSettings(
        engine_args=engine_args,
        env_vars=env_vars,
        weight_hub=weight_hub,
        rpc_timeout_seconds=rollout.timeout_seconds,
        start_timeout_seconds=rollout.start_timeout_seconds,
    )


def max_model_tokens(config: PolicyRunConfig) -> int:
    """The longest sequence an engine may hold: the prompt budget and the longer of the two response
    budgets.
    """
    rollout = config.rollout
    new_tokens = max(rollout.max_response_tokens, config.eval_sampling.max_new_tokens)
    return config.data.max_prompt_tokens + new_tokens
