"""vLLM engine configuration: engine arguments and environment variables of `EngineActor` on GPU and CPU."""

from __future__ import annotations

from typing import Any

import torch

from rayrlhf.config.model import ENGINE_LORA_RANKS, LoraConfig, ModelConfig
from rayrlhf.config.rollout import EngineConfig
from rayrlhf.models.load import resolve_dtype
from rayrlhf.placement.process_variables import cpu_engine_variables, engine_variables
from rayrlhf.rollout.engine import EngineSettings

KV_BLOCK_TOKENS = 32
PREFILL_TOKENS = 4096  # per step of a CPU engine
MAY_ROUND_PRODUCTS = "may_round_products"  # of a CPU engine: in `additional_config`


def engine_settings(
    model: ModelConfig,
    rollout: EngineConfig,
    *,
    seed: int,
    max_model_tokens: int,
    weight_store: str | None,
    on_gpu: bool,
    threads: int,
    sleeps: bool = False,
    router_replay: bool = False,
    keeps_cache: bool = False,
    adapter: LoraConfig | None = None,
) -> EngineSettings:
    """
    Args:
        weight_store: name of the weight store's actor; None: the engines keep the weights of the checkpoint.
        sleeps: engines release their memory while trainers use it.
        router_replay: generations have the experts of each token.
        keeps_cache: running requests go on with keys and values of the weights before a push.
        adapter: that pushes send alone, its target modules named: vLLM would otherwise adapt more layers.
    """
    engine_args: dict[str, Any] = {
        "model": model.path,
        "trust_remote_code": model.trust_remote_code,
        "max_model_len": max_model_tokens,
        "max_num_seqs": rollout.max_concurrent_requests,
        "seed": seed,
        "disable_log_stats": True,
        # The engine's log-probabilities must be those the trainer computes: at the sampling temperature.
        "logprobs_mode": "processed_logprobs",
    }
    env_vars = engine_variables()
    if adapter is not None:
        engine_args |= {
            "enable_lora": True,
            "max_loras": 1,  # the newest; the previous one is removed first
            "max_lora_rank": next(rank for rank in ENGINE_LORA_RANKS if rank >= adapter.rank),
            "lora_target_modules": adapter.target_modules,
        }
    engine_args["dtype"] = str(engine_dtype(model, rollout, on_gpu=on_gpu)).removeprefix("torch.")
    if on_gpu:
        engine_args |= {
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "enable_sleep_mode": sleeps,
            "sleep_mode_offload_cudagraph": sleeps,  # else the pools of graphs stay while trainers work
            "max_num_batched_tokens": rollout.batch_tokens,
        }
        if router_replay:  # only vLLM's second model runner returns routes
            engine_args |= {"enable_return_routed_experts": True}
            env_vars |= {"VLLM_USE_V2_MODEL_RUNNER": "1"}
        if rollout.tensor_parallel > 1:
            # Workers run on the slots that placement.replica sets in the environment.
            engine_args |= {
                "tensor_parallel_size": rollout.tensor_parallel,
                "distributed_executor_backend": "ray",
            }
    else:
        engine_args |= {
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": rollout.kv_cache_bytes,
            "block_size": KV_BLOCK_TOKENS,
            # Chunked prefill kills vLLM's CPU engine when the request has a seed (it rewinds a generator that
            # does not support it): prompts are prefilled in one step.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(PREFILL_TOKENS, max_model_tokens),
        }
        if rollout.dtype == model.dtype == "auto":  # as trainers: models.load.choose_products
            engine_args["additional_config"] = {MAY_ROUND_PRODUCTS: True}
        env_vars |= cpu_engine_variables(rollout.num_threads or threads)
    return EngineSettings(
        # null is as if it were left out: vLLM's own default would not be the plan's.
        engine_args=engine_args | {k: v for k, v in rollout.engine_args.items() if v is not None},
        env_vars=env_vars,
        weight_store=weight_store,
        rpc_timeout_seconds=rollout.timeout_seconds,
        start_timeout_seconds=rollout.start_timeout_seconds,
        router_replay=router_replay,
        keeps_cache=keeps_cache,
    )


def engine_dtype(model: ModelConfig, rollout: EngineConfig, *, on_gpu: bool) -> torch.dtype:
    """Dtype of the engines' weights and adapters."""
    name = rollout.dtype if rollout.dtype != "auto" else model.dtype
    return resolve_dtype(name, torch.device("cuda" if on_gpu else "cpu"))
