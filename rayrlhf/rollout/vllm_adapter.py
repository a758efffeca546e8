"""Adapter updates: a pushed LoRA adapter becomes vLLM's only one, under a new id, and running requests
continue with it.

vLLM loads adapters from folders, once per id: a request with a known id uses what was loaded under it, and a
known name and path select blocks of the prefix cache. So each version has its own id and name, and the
tensors come from memory (`LoRAModel.from_lora_tensors`). The scaling alpha / rank is already in the pushed B,
so the layers' buffers hold the pushed bytes and can be compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name, replace_submodule

from rayrlhf.models.adapter_format import ADAPTER_PREFIX
from rayrlhf.weights.checksum import checksum
from rayrlhf.weights.store import AdapterSpec

FIX = "set rollout.weight_sync.lora to merged"


class AdapterUpdate:
    """One update of a worker's adapter: `collect` for each bucket, then `finish`."""

    def __init__(self, model_runner: Any) -> None:
        self.model_runner = model_runner
        self.lora_manager = model_runner.lora_manager
        self.layers = self.lora_manager._adapter_manager
        rename = getattr(self.layers.model, "hf_to_vllm_mapper", None)
        self.rename = None if rename is None else rename.get_rename_mapper()
        self.tensors: dict[str, Tensor] = {}

    def collect(self, pieces: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors out of a bucket, which the sender may refill afterwards."""
        for name, tensor in pieces:
            self.tensors[name] = tensor.to("cpu", copy=True)

    def finish(self, request: LoRARequest, spec: AdapterSpec) -> None:
        """Replace the previous adapter.

        Raises:
            RuntimeError: names the tensors without a layer in the engine, or that differ from the trainer's.
        """
        layers = {name: self._layer(name) for name in spec.checksums}
        if homeless := sorted(name for name, found in layers.items() if found is None):
            raise RuntimeError(
                f"the engine has no layer for {len(homeless)} tensors of the adapter, among them "
                f"{homeless[:5]}. Fix: {FIX}"
            )
        self.layers.remove_all_adapters()
        self.layers.add_adapter(
            LoRAModel.from_lora_tensors(
                request.lora_int_id,
                {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in self.tensors.items()},
                PEFTHelper(r=spec.rank, lora_alpha=spec.rank, target_modules=[]),
                device="cpu",
                dtype=self.layers.lora_config.lora_dtype,
                weights_mapper=self.rename,
            )
        )
        self.layers.activate_adapter(request.lora_int_id)
        slot = self.layers.lora_index_to_id.index(request.lora_int_id)
        wrong = [name for name, wanted in spec.checksums.items() if not self._holds(name, wanted, slot)]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} adapter tensors of the engine differ from the trainer's, among them "
                f"{sorted(wrong)[:5]}"
            )
        _switch_requests(self.model_runner, request)

    def _layer(self, name: str) -> tuple[Any, int, int] | None:
        """(layer, position, number) for a tensor of the adapter: the layer fuses `number` adapted modules, as
        qkv_proj fuses q_proj, k_proj and v_proj.
        """
        module, _ = parse_fine_tuned_lora_name(f"{ADAPTER_PREFIX}{name}", self.rename)
        for fused, parts in self.layers.packed_modules.items():
            if module in parts:
                layer = self.layers.modules[fused]
                return (layer, parts.index(module), len(parts)) if layer.n_slices == len(parts) else None
        layer = self.layers.modules.get(module)
        return None if layer is None or not hasattr(layer, "n_slices") else (layer, 0, 1)

    def _holds(self, name: str, wanted: int, slot: int) -> bool:
        """Whether this worker received the tensor with this checksum and its layer holds it, or its shard."""
        tensor = self.tensors.get(name)
        found = self._layer(name)
        if tensor is None or found is None or checksum(tensor) != wanted:
            return False
        layer, position, number = found
        is_a = name.endswith("lora_A.weight")
        if layer.tp_size > 1:
            tensor = _shard(layer.slice_lora_a if is_a else layer.slice_lora_b, tensor, position, number)
            wanted = checksum(tensor)
        return checksum(_held(layer, position, number, slot, is_a=is_a, shape=tensor.shape)) == wanted


def _held(layer: Any, position: int, number: int, slot: int, *, is_a: bool, shape: torch.Size) -> Tensor:
    """A [r, in] or B [out, r] in the layer's buffers, which are padded to the engine's largest rank."""
    stacked = layer.lora_a_stacked if is_a else layer.lora_b_stacked
    parts = [stacked[position]] if number > 1 or is_a else stacked  # one B for a layer of several slices
    whole = torch.cat([part[slot, 0] for part in parts])
    return whole[: shape[0], : shape[1]]


def _shard(cut: Callable[[Any], Any], tensor: Tensor, position: int, number: int) -> Tensor:
    """This worker's part of a tensor, as vLLM cuts it."""
    if number == 1:
        return cut(tensor)
    return cut([tensor if index == position else None for index in range(number)])[position]


def _switch_requests(model_runner: Any, request: LoRARequest) -> None:
    """Continue the worker's requests, which are all preempted, with the new adapter.

    vLLM's first model runner keeps a preempted request's state and would resume it with the old adapter; the
    second one receives it again from the scheduler.
    """
    requests = getattr(model_runner, "requests", None)
    for state in requests.values() if isinstance(requests, dict) else ():
        state.lora_request = request


def multiply_all_tokens_at_once() -> None:
    """On a CPU, vLLM 0.32 copies A and B for every token, [tokens, rank, in]: gigabytes for a long prompt. A
    single adapter is every token's, so that one product is enough. It is rounded once, as on a GPU.
    """
    shrink, expand = PunicaWrapperCPU._apply_shrink, PunicaWrapperCPU._apply_expand

    def shrink_all(self: Any, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        if w_t_all.shape[0] > 1 or not self.is_prefill:
            shrink(self, y, x, w_t_all, scale)
        elif not self.no_lora:
            y.copy_(scale * (x.float() @ w_t_all[0, 0].float().T))

    def expand_all(
        self: Any,
        y: Tensor,
        x: Tensor,
        w_t_all: Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        if w_t_all.shape[0] > 1 or not self.is_prefill or not add_inputs:
            expand(self, y, x, w_t_all, y_offset, y_slice_size, add_inputs)
        elif not self.no_lora:
            y[:, y_offset : y_offset + y_slice_size] += x @ w_t_all[0, 0].float().T

    PunicaWrapperCPU._apply_shrink = shrink_all
    PunicaWrapperCPU._apply_expand = expand_all


def take_off_adapters(model: Any) -> None:
    """Put the layers that LoRA wraps back into the model, so that its weights have a checkpoint's names."""
    for name, layer in _adapted_layers(model):
        replace_submodule(model, name, layer.base_layer)


def put_on_adapters(model: Any) -> None:
    for name, layer in _adapted_layers(model):
        replace_submodule(model, name, layer)


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """None if the engine holds no adapters."""
    layers = getattr(model, "lora_manager", None)
    yield from layers.modules.items() if layers is not None else ()


def scheduled_requests(engine: Any) -> Iterator[Any]:
    """The scheduler's requests of an in-process engine."""
    yield from engine.engine_core.engine_core.scheduler.requests.values()


def switch_scheduled(engine: Any, request: LoRARequest) -> None:
    """Continue the engine's unfinished requests, which are all preempted or new, with the new adapter; their
    tokens are hashed again for the prefix cache, with its name.
    """
    for scheduled in scheduled_requests(engine):
        scheduled.lora_request = request
        scheduled.block_hashes.clear()
        scheduled.update_block_hashes()
