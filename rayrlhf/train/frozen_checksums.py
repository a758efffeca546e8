"""Checksums of frozen weights, which checkpoints contain instead of the weights.

The model's folder already has the weights, and with adapters they are nearly all there is. A checksum per
tensor (the sum of its bits) detects a run that is resumed on another base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrlhf.train import collectives

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
PIECE = 2**24  # elements that are widened to 8 bytes at a time


def bit_sums(module: nn.Module) -> dict[str, int]:
    """Checksum of every frozen parameter, by name; independent of the number of ranks and of partitioning.
    Collective.
    """
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    if not frozen:
        return {}
    sums = torch.tensor([_own_share(parameter) for _, parameter in frozen], dtype=torch.int64)
    return dict(zip((name for name, _ in frozen), collectives.sum_over_ranks(sums).tolist(), strict=True))


def _own_share(parameter: Any) -> int:
    """This rank's contribution: the sum over its partition under ZeRO-3, without the arbitrary padding of the
    last partitions. A parameter that every rank holds in full is counted by rank 0.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return _bit_sum(parameter.data) if collectives.rank() == 0 else 0
    begin = part.numel() * dist.get_rank(parameter.ds_process_group)
    return _bit_sum(part.flatten()[: max(0, parameter.ds_numel - begin)])


def _bit_sum(tensor: Tensor) -> int:
    bits = tensor.flatten().view(INTEGERS[tensor.element_size()])
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(PIECE))


def check(saved: dict[str, int], module: nn.Module) -> None:
    """Raise `ValueError` when a frozen parameter differs from the saved checksums. Collective."""
    own = bit_sums(module)
    changed = [name for name, total in saved.items() if own.get(name) != total]
    if changed:
        raise ValueError(
            f"{changed[0]}: got another frozen weight than the checkpoint was trained on "
            f"({len(changed)} of {len(saved)} differ), wanted the same. "
            "Fix: model.path must be the model that the run began with"
        )


@contextmanager
def left_out(module: nn.Module) -> Iterator[None]:
    """In this context `module.state_dict()` omits frozen parameters."""
    names = _names(module)

    def leave_out(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for name in names & {key.removeprefix(prefix) for key in state}:
            del state[prefix + name]

    hook = module.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        hook.remove()


def load(src: dict[str, Tensor], dst: nn.Module) -> None:
    """DeepSpeed's `custom_load_fn`: load a state dict saved inside `left_out` into `dst`. Raises
    `RuntimeError` if anything but frozen parameters is missing, or if there are unknown keys.
    """
    result = dst.load_state_dict(src, strict=False)
    missing = set(result.missing_keys) - _names(dst)
    if missing or result.unexpected_keys:
        raise RuntimeError(
            f"the checkpoint is of another module: missing {sorted(missing)}, "
            f"unexpected {sorted(result.unexpected_keys)}"
        )


def _names(module: nn.Module) -> set[str]:
    """Names of the frozen parameters; tied ones under each of their names."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
