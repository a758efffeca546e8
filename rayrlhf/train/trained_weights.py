"""Checkpoints of the trained weights alone (`checkpoint.optimizer: false`): one file, for any number of ranks
and ZeRO stage. After a resume the optimizer's moments start from zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rayrlhf.models.modes import honour_umask
from rayrlhf.train import collectives
from rayrlhf.train.deepspeed_engine import gathered

FILE = "weights.safetensors"


def has_weights(folder: Path) -> bool:
    return (folder / FILE).is_file()


def save(module: nn.Module, folder: Path) -> None:
    """Rank 0 writes all trained parameters in full, in their own dtype. Collective."""
    state: dict[str, Tensor] = {}
    for name, parameter in _trained(module):
        with gathered([parameter]):
            if collectives.rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    if collectives.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / FILE)
        honour_umask(folder)


@torch.no_grad()
def load(engine: Any, folder: Path) -> None:
    """Load them into a DeepSpeed engine, whose master weights are then made from them. Collective.

    Raises:
        ValueError: if they are of another model.
    """
    with safe_open(folder / FILE, framework="pt") as file:
        saved = set(file.keys())
        own = dict(_trained(engine.module))
        if saved != own.keys():
            different = sorted(saved ^ own.keys())
            raise ValueError(
                f"{folder / FILE} has other parameters than this model trains: {len(different)} differ, "
                f"e.g. {different[0]}"
            )
        for name, parameter in own.items():
            with gathered([parameter], changed_by=0):
                parameter.copy_(file.get_tensor(name))
    if hasattr(engine.optimizer, "refresh_fp32_params"):  # not torch's own, of stage 0
        engine.optimizer.refresh_fp32_params()


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, each) for name, each in module.named_parameters() if each.requires_grad)
