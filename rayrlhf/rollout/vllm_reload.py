"""Weight updates through vLLM's layerwise reload, with a check that every parameter was loaded.

vLLM's kernels may need weights in another layout than the checkpoint's (experts packed for a CPU, gate and up
swapped, MLA's absorbed projections). Its layerwise reload restores every layer's loading layout, collects
the tensors that arrive for it, and processes and copies the layer when it is complete. It does not report
missing tensors: that is checked here, by names and by numbers of elements.
https://docs.vllm.ai/en/latest/training/layerwise/
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

# It warns about every layer without loaded tensors, including rotary tables and tied heads.
logging.getLogger(layerwise.__name__).setLevel(logging.ERROR)


class Reload:
    """One update of a model's weights: `start`, then `collected` after each load, then `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def start(self) -> None:
        put_back(self.model)  # in case the previous update was interrupted
        tied = _tied_names(self.model)
        layerwise.initialize_layerwise_reload(self.model)
        self.wanted = {name for name, _ in self.model.named_parameters()} - tied
        self.reached: set[str] = set()

    def collected(self, names: set[str], flat: Tensor) -> None:
        """Record a load; copies tensors of `flat` that incomplete layers still refer to.

        Args:
            names: parameters that were loaded from `flat`.
            flat: bucket, which the sender may refill afterwards.
        """
        self.reached |= names
        bucket = flat.untyped_storage().data_ptr()
        for layer in self.model.modules():
            for _, call in layerwise.get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == bucket:
                        call.arguments[name] = value.clone()

    def finish(self, model_config: Any) -> None:
        """Complete the update.

        Raises:
            RuntimeError: if a parameter was not loaded, or only in part; the weights are unusable then.
        """
        missing = sorted({*(self.wanted - self.reached), *self._incomplete()})
        if missing:
            put_back(self.model)
            raise RuntimeError(
                f"weight sync left {len(missing)} engine parameters at their old values, among them "
                f"{missing[:5]}: the trainer's model and the engine's model differ"
            )
        layerwise.finalize_layerwise_reload(self.model, model_config)

    def _incomplete(self) -> Iterator[str]:
        """Parameters of layers that received fewer elements than they have."""
        for prefix, layer in self.model.named_modules():
            info = layerwise.get_layerwise_info(layer)
            names = {f"{prefix}.{name}" if prefix else name for name, _ in _own_parameters(layer)}
            if info.can_load() and info.load_numel < _size(layer):
                yield from names & self.wanted


def put_back(model: nn.Module) -> None:
    """Abort an update in progress: restores the kernel parameters of every incomplete layer."""
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()


def _tied_names(model: nn.Module) -> set[str]:
    """Additional names of tied parameters, which are loaded under their first name."""
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return all_names - {name for name, _ in model.named_parameters()}


def _own_parameters(layer: nn.Module) -> list[tuple[str, Tensor]]:
    own = layer.named_parameters(recurse=False)
    return [(name, parameter) for name, parameter in own if name not in SKIP_LOAD_TENSORS]


def _size(layer: nn.Module) -> int:
    """Number of elements of the layer's parameters in a checkpoint, which has no vocabulary padding."""
    size = sum(get_tensor_load_numel(parameter) for _, parameter in _own_parameters(layer))
    if isinstance(layer, VocabParallelEmbedding):
        return size // layer.num_embeddings_per_partition * layer.num_org_embeddings_per_partition
    return size


def pack_experts_at_every_load() -> None:
    """On a CPU, vLLM 0.32 packs experts for its kernel only at the first load, and would then read the
    unpacked weights of a reload as packed ones.
    """
    process = UnquantizedFusedMoEMethod.process_weights_after_loading

    def process_and_pack(self: UnquantizedFusedMoEMethod, layer: Any) -> None:
        packed_before = self.moe_kernel is not None
        process(self, layer)
        if packed_before and self.moe_kernel is not None:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod.process_weights_after_loading = process_and_pack
