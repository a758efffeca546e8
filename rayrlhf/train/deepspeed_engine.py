"""DeepSpeed engines built from the config's `train` section, and full state dicts gathered from them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# DeepSpeed selects its accelerator at import, and without CUDA it would first look for vendors' tools.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from rayrlhf.config.train import OptimizerConfig
from rayrlhf.models.adapters import Weight, adapter_weights, weights_of
from rayrlhf.train import collectives

# On a CPU, DeepSpeed compiles a shared-memory collective at first use (about a minute); use gloo instead.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# Elements of a communication buffer, which DeepSpeed allocates whole (its default, 5e8, is 2 GB in fp32).
MAX_BUCKET_NUMEL = 200_000_000


def deepspeed_config(
    train: OptimizerConfig, *, lr: float | None, dtype: torch.dtype, num_parameters: int
) -> dict[str, Any]:
    """DeepSpeed's config. `lr=None` gives an engine without optimizer: a frozen, ZeRO-3 partitioned model."""
    bucket = min(MAX_BUCKET_NUMEL, num_parameters + num_parameters % 2)  # DeepSpeed requires an even number
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": train.overlap_comm,
        "contiguous_gradients": True,
    }
    if train.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    on_gpu = torch.cuda.is_available()
    if train.offload_optimizer and lr is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if train.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    if train.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = train.hpz_partition_size
    config: dict[str, Any] = {
        # Micro-batches are counted by the learner, not by DeepSpeed: their number varies from step to step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 in fp32 is clipped by the learner, which needs the norm.
        "gradient_clipping": train.max_grad_norm if train.zero_stage or dtype != torch.float32 else 0.0,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if dtype == torch.bfloat16:
        short = train.master_weights == "bfloat16" and lr is not None
        config["bf16"] = {
            "enabled": True,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": short,
            "bf16_optimizer_states": short,
        }
        if lr is not None and train.grad_accum_dtype == "float32":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if lr is not None:
        optimizer: dict[str, Any] = {
            "lr": lr,
            "betas": list(train.betas),
            "eps": train.eps,
            "weight_decay": train.weight_decay,
        }
        if not (train.offload_optimizer and on_gpu):
            # torch's fused AdamW: as fast as DeepSpeed's, and nothing to compile on the first step. On the
            # host of a GPU DeepSpeed's own is worth it: it overlaps its steps with the copies.
            optimizer |= {"torch_adam": True, "fused": True}
        config["optimizer"] = {"type": "AdamW", "params": optimizer}
    return config


def make_engine(module: nn.Module, train: OptimizerConfig, *, lr: float | None, dtype: torch.dtype) -> Any:
    """An engine over the process group that Ray Train has already set up."""
    everything = list(module.parameters())
    trainable: Any = [p for p in everything if p.requires_grad] if lr is not None else None
    num_parameters = sum(map(_numel, trainable or everything))
    engine, *_ = deepspeed.initialize(
        model=module,
        config=deepspeed_config(train, lr=lr, dtype=dtype, num_parameters=num_parameters),
        model_parameters=trainable,
    )
    if train.zero_stage == 0 and collectives.world_size() == 1:
        # After every backward pass the engine would copy all gradients into a buffer and back, for an
        # all-reduce over a single rank. Under ZeRO the optimizer takes its gradients from the reduction.
        engine.enable_backward_allreduce = False
    return engine


@contextmanager
def loading(train: OptimizerConfig, dtype: torch.dtype, *, in_parts: bool = True) -> Iterator[None]:
    """In this context transformers loads weights partitioned under ZeRO-3: no rank holds a full model.

    Heads that are not in the checkpoint, models below ZeRO-3, and models with `in_parts=False` are loaded in
    full. Collective.
    """
    if train.zero_stage < 3 or not in_parts:
        yield
        return
    config = deepspeed_config(train, lr=None, dtype=dtype, num_parameters=MAX_BUCKET_NUMEL)
    kept = HfDeepSpeedConfig(config)  # transformers holds it weakly
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def _numel(parameter: nn.Parameter) -> int:
    """Number of elements of the full tensor, also when ZeRO-3 partitions it."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def gathered(parameters: Sequence[Tensor], *, changed_by: int | None = None) -> Iterator[None]:
    """In this context the parameters hold their full tensors on every rank (a no-op below ZeRO-3).
    Collective.

    `changed_by`: the rank whose changes all ranks get under ZeRO-3; without one, changes are lost.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    with GatheredParameters(partitioned, modifier_rank=changed_by):
        yield


def full_state_dict(module: nn.Module, *, on_this_rank: bool) -> dict[str, Tensor]:
    """All weights, with adapters merged, and buffers, on the CPU, gathered one by one. Collective; empty
    unless `on_this_rank`.
    """
    # Tied tensors appear under each of their names.
    state = _copied(weights_of(module, remove_duplicate=False), on_this_rank=on_this_rank)
    if on_this_rank:
        saved = module.state_dict().keys()  # leaves out buffers that are recomputed on loading
        for name, buffer in module.named_buffers():
            if name in saved:
                state[name] = buffer.detach().to("cpu", copy=True)
    return state


def adapter_state_dict(module: nn.Module, *, on_this_rank: bool) -> dict[str, Tensor]:
    """The adapters' weights only, named as in `adapter_weights`. Collective; empty unless `on_this_rank`."""
    adapters = (Weight(name, parameter) for name, parameter in adapter_weights(module))
    return _copied(adapters, on_this_rank=on_this_rank)


def _copied(weights: Iterable[Weight], *, on_this_rank: bool) -> dict[str, Tensor]:
    """All ranks iterate over the same names in the same order. Tied weights stay one tensor, so an export
    saves them once.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for weight in weights:
        key = id(weight.parameter)
        if key not in copies:
            with gathered(weight.parts):
                copies[key] = weight.merged().to("cpu", copy=True) if on_this_rank else torch.empty(0)
        if on_this_rank:
            state[weight.name] = copies[key]
    return state
