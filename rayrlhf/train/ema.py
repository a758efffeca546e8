"""Exponential moving average (EMA) of a module's weights, kept on the CPU during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.train.collectives import Ranks
from rayrlhf.train.safe_load import only_tensors


class ExponentialMovingAverage:
    """average ← β·average + (1-β)·weight after each optimizer step (Polyak & Juditsky 1992), in fp32.

    The averages start at the weights that `module` has at construction, which must come after its engine's
    (ZeRO-3 partitions the parameters there). Only trainable parameters are averaged; the others never change.
    Under ZeRO-3 each rank averages its own partition. Below ZeRO-3 all ranks have the same weights and only
    rank 0 keeps averages: on the other ranks this object is empty and every method is a no-op.

    The module's own weights are averaged, possibly bfloat16, not the optimizer's fp32 copy.

    Raises:
        ValueError: unless 0 < beta < 1.
    """

    def __init__(self, module: nn.Module, beta: float, ranks: Ranks | None = None) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"ema beta={beta} must be > 0 (which keeps nothing) and < 1 (which never moves)")
        self.beta = beta
        self.ranks = ranks or Ranks()
        self._module = module
        self._averages = {
            name: weight.to("cpu", torch.float32, copy=True) for name, weight in self._weights()
        }

    def update(self) -> None:
        """Move the averages towards the weights, once per optimizer step."""
        for name, weight in self._weights():
            # Cast after the copy: 16-bit weights are half the bytes to copy.
            self._averages[name].lerp_(weight.to("cpu").float(), 1 - self.beta)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """In this context the module holds the averages, cast to its dtype; on exit its own weights are
        restored bit for bit.

        For exports, not for training steps. All ranks must enter it: under ZeRO-3 a tensor gathered inside is
        assembled from all ranks' averages. Below ZeRO-3 only rank 0's weights change, and
        `engine.full_state_dict` reads only those; a forward pass on all ranks would mix averages and weights.
        """
        kept: dict[str, Tensor] = {}
        try:
            for name, weight in self._weights():
                kept[name] = weight.to("cpu", copy=True)
                weight.copy_(self._averages[name])
            self._forget_gathered()
            yield
        finally:
            for name, weight in self._weights():
                if name in kept:
                    weight.copy_(kept[name])
            self._forget_gathered()

    def save(self, folder: Path) -> None:
        """Save this rank's averages, if it has any."""
        if self._averages:
            torch.save(self._averages, _file(folder, self.ranks.rank))

    def load(self, folder: Path) -> None:
        """Raises `FileNotFoundError` if the folder has no averages, `ValueError` if they do not fit the
        module.
        """
        if not self._averages:
            return
        path = _file(folder, 0)
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path.name} in {folder}: the checkpoint was made without an average of the weights "
                "(algorithm.ema_beta)"
            )
        saved = self._read(folder)
        shapes, wanted = ({n: tuple(t.shape) for n, t in a.items()} for a in (saved, self._averages))
        if shapes != wanted:
            wrong = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
            raise ValueError(
                f"{path} does not fit this model or number of workers: {len(wrong)} parameters differ, "
                f"e.g. {wrong[0]} is {shapes.get(wrong[0])} there and {wanted.get(wrong[0])} here"
            )
        self._averages = saved

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """This rank's averages by weight name, also from a checkpoint of another number of workers."""
        files = sorted(folder.glob("ema-rank-*.pt"))
        if not self._is_partitioned() or len(files) == self.ranks.world_size:
            return _load(_file(folder, self.ranks.rank))
        parts = [_load(file) for file in files]
        return {
            name: self._cut(name, torch.cat([part[name] for part in parts]), mine.numel())
            for name, mine in self._averages.items()
        }

    def _is_partitioned(self) -> bool:
        return any(hasattr(parameter, "ds_tensor") for parameter in self._module.parameters())

    def _cut(self, name: str, flat: Tensor, size: int) -> Tensor:
        """This rank's `size` elements of a weight that is flattened over all ranks and padded at its end."""
        parameter: Any = self._module.get_parameter(name)
        start = self.ranks.rank * size
        mine = flat[: parameter.ds_numel][start : start + size]
        return torch.cat([mine, mine.new_zeros(size - mine.numel())])

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trainable weights that this rank averages, by name: its partitions, on rank 0 all of them."""
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_tensor"):
                partitioned: Any = parameter
                yield name, partitioned.ds_tensor.data
            elif self.ranks.rank == 0:
                yield name, parameter.data

    def _forget_gathered(self) -> None:
        """Free whole tensors under ZeRO-3, so that the next use gathers them from the partitions again.

        DeepSpeed leaves small ones gathered between steps (`stage3_param_persistence_threshold`).
        """
        partitioned: list[Any] = [p for p in self._module.parameters() if hasattr(p, "ds_tensor")]
        if partitioned:
            partitioned[0].partition(param_list=partitioned)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"ema-rank-{rank:04d}.pt"


def _load(path: Path) -> dict[str, Tensor]:
    with only_tensors(path.parent):
        return torch.load(path, map_location="cpu", weights_only=True)
