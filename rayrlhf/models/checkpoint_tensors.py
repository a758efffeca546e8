"""A model's weights in checkpoint format: the names and layouts of its files, not those in memory.

transformers stores some weights differently in memory: the experts of a layer as one tensor, under another
name. `save_pretrained` reverts that for whole models; this module reverts it for a few parameters at a time,
as many as are converted together, so that partitioned ones are never gathered all at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from rayrlhf.models.adapters import Weight, weights_of


class TensorSpec(NamedTuple):
    """Name, shape and dtype of a checkpoint tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointTensors(NamedTuple):
    """Tensors of the checkpoint that are converted together, and the weights that they are converted from.

    Example, Mixtral with 4 experts: weights `model.layers.0.mlp.experts.gate_up_proj` [4, 2I, H]; specs
    `model.layers.0.block_sparse_moe.experts.0.w1.weight` [I, H] to `….3.w3.weight`, 8 in all.
    """

    weights: tuple[Weight, ...]
    specs: tuple[TensorSpec, ...]
    model: PreTrainedModel | None = None  # whose conversions apply; None: each weight equals its tensor

    @classmethod
    def of(cls, weight: Weight, name: str | None = None) -> CheckpointTensors:
        """A weight that equals a checkpoint tensor, under the same or another name."""
        return cls((weight,), (TensorSpec(name or weight.name, weight.dtype, weight.shape),))

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that `tensors` reads; under ZeRO-3 they must be gathered first."""
        return [part for weight in self.weights for part in weight.parts]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    def tensors(self) -> list[Tensor]:
        """The tensors of `specs`, in order; adapters are merged."""
        merged = [weight.merged() for weight in self.weights]
        if self.model is None:
            return merged
        names = [weight.name for weight in self.weights]
        made = revert_weight_conversion(self.model, dict(zip(names, merged, strict=True)))
        return [made[spec.name] for spec in self.specs]


def checkpoint_tensors(model: PreTrainedModel, *, adapters: bool = True) -> Iterator[CheckpointTensors]:
    """All parameters and saved buffers of the model, in the parameters' order; tied ones once. With its
    adapters merged, or of the base alone.

    The reverse mapping is the one of transformers with which the checkpoint was loaded, or the
    architecture's.
    """
    weights = {weight.name: weight for weight in [*weights_of(model), *_saved_buffers(model)]}
    if not adapters:
        weights = {name: weight._replace(layer=None) for name, weight in weights.items()}
    for names, new_name in _groups(model, list(weights)):
        members = tuple(weights[name] for name in names)
        if new_name is not None:
            [weight] = members
            yield CheckpointTensors.of(weight, new_name)
            continue
        shells = {w.name: torch.empty(w.shape, dtype=w.dtype, device="meta") for w in members}
        made = revert_weight_conversion(model, shells)
        specs = tuple(TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in made.items())
        yield CheckpointTensors(members, specs, model)


def _saved_buffers(model: PreTrainedModel) -> Iterator[Weight]:
    """Such as the biases with which DeepSeek's router balances experts: saved, but not trained."""
    saved = model.state_dict().keys()  # excludes buffers that are recomputed on loading
    for name, buffer in model.named_buffers():
        if name in saved:
            yield Weight(name, buffer)


def _groups(model: PreTrainedModel, names: Sequence[str]) -> Iterator[tuple[list[str], str | None]]:
    """Names of parameters that are converted together; the checkpoint's name if one is only renamed."""
    ways_back = [conversion.reverse_transform() for conversion in reversed(_conversions(model))]
    renamings: Any = [way for way in ways_back if isinstance(way, WeightRenaming)]
    converters: Any = [way for way in ways_back if isinstance(way, WeightConverter)]
    groups: dict[str, list[str]] = {}
    converted: set[str] = set()
    for name in names:
        key, pattern = rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault(key, []).append(name)
        if pattern is not None:
            converted.add(key)
    for key, members in groups.items():
        yield members, None if key in converted else key


def _conversions(model: PreTrainedModel) -> list[Any]:
    """As `revert_weight_conversion` chooses them."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
