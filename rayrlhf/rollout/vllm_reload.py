"""New weights into vLLM's layers, through vLLM's own lifecycle of a reload, and nothing left out.

vLLM's kernels may want weights in another layout than the checkpoint's (experts packed for a CPU, gate and up
swapped, MLA's absorbed projections). Its layerwise reload gives every layer its loading form again, collects
what arrives for it, and processes and copies the layer when it is whole. What it does not say is whether
something was left out: that is checked here, by names and by numbers of elements.
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

# It warns of every layer that nothing was loaded for, among them rotary tables and tied heads.
logging.getLogger(layerwise.__name__).setLevel(logging.ERROR)


class Reload:
    """One update of a model's weights: `start`, then `collected` after each load, then `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def start(self) -> None:
        put_back(self.model)  # what an update that broke off has left
        tied = _tied_names(self.model)
        layerwise.initialize_layerwise_reload(self.model)
        self.wanted = {name for name, _ in self.model.named_parameters()} - tied
        self.reached: set[str] = set()

    def collected(self, names: set[str], flat: Tensor) -> None:
        """`names` were loaded out of `flat`, which the sender may fill again: layers that still wait for more
        get copies of what they keep.
        """
        self.reached |= names
        ours = flat.untyped_storage().data_ptr()
        for layer in self.model.modules():
            for _, call in layerwise.get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == ours:
                        call.arguments[name] = value.clone()

    def finish(self, model_config: Any) -> None:
        """Raises `RuntimeError` for what was not sent, or only in part; then the weights are of no use."""
        missing = sorted({*(self.wanted - self.reached), *self._incomplete()})
        if missing:
            put_back(self.model)
            raise RuntimeError(
                f"weight sync left {len(missing)} engine parameters at their old values, among them "
                f"{missing[:5]}: the trainer's model and the engine's model differ"
            )
        layerwise.finalize_layerwise_reload(self.model, model_config)

    def _incomplete(self) -> Iterator[str]:
        """Parameters of layers that got fewer elements than they have."""
        for prefix, layer in self.model.named_modules():
            info = layerwise.get_layerwise_info(layer)
            names = {f"{prefix}.{name}" if prefix else name for name, _ in _own_parameters(layer)}
            if info.can_load() and info.load_numel < _size(layer):
                yield from names & self.wanted


def put_back(model: nn.Module) -> None:
    """End an update that is under way: every layer that waits has the parameters that its kernels use."""
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()


def _tied_names(model: nn.Module) -> set[str]:
    """Further names of parameters that have one already: they come with that."""
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return everything - {name for name, _ in model.named_parameters()}


def _own_parameters(layer: nn.Module) -> list[tuple[str, Tensor]]:
    found = layer.named_parameters(recurse=False)
    return [(name, parameter) for name, parameter in found if name not in SKIP_LOAD_TENSORS]


def _size(layer: nn.Module) -> int:
    """Elements that a checkpoint has for the layer's parameters; the padding of a vocabulary is not there."""
    size = sum(get_tensor_load_numel(parameter) for _, parameter in _own_parameters(layer))
    if isinstance(layer, VocabParallelEmbedding):
        return size // layer.num_embeddings_per_partition * layer.num_org_embeddings_per_partition
    return size


def pack_experts_at_every_load() -> None:
    """On a CPU, vLLM 0.32 packs experts for its kernel at the first load only, and would go on to read the
    unpacked weights of a reload as packed ones.
    """
    process = UnquantizedFusedMoEMethod.process_weights_after_loading

    def process_and_pack(self: UnquantizedFusedMoEMethod, layer: Any) -> None:
        packed_before = self.moe_kernel is not None
        process(self, layer)
        if packed_before and self.moe_kernel is not None:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod.process_weights_after_loading = process_and_pack
