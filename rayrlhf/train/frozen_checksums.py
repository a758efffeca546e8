"""Frozen weights stay out of checkpoints: the model's folder has them, and beside adapters they are nearly
all there is. A sum of each one's bits goes in instead, to tell when a run would go on upon another model.
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
    """Of every frozen parameter, the same however many ranks hold it or parts of it. Collective."""
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    if not frozen:
        return {}
    sums = torch.tensor([_own_share(parameter) for _, parameter in frozen], dtype=torch.int64)
    return dict(zip((name for name, _ in frozen), collectives.sum_over_ranks(sums).tolist(), strict=True))


def _own_share(parameter: Any) -> int:
    """This rank's summand: of its part under ZeRO-3, where the last parts are padded with anything; of a
    parameter that every rank has whole, the first rank's.
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
    """Raises `ValueError` when a frozen parameter is not the one that was saved. Collective."""
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
    """Inside, `module.state_dict()` has no frozen parameter."""
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
    """Into `dst` what `left_out` has let through, as DeepSpeed's `custom_load_fn`. Raises `RuntimeError` for
    what is missing besides.
    """
    result = dst.load_state_dict(src, strict=False)
    missing = set(result.missing_keys) - _names(dst)
    if missing or result.unexpected_keys:
        raise RuntimeError(
            "the checkpoint is of another module: it lacks "
            f"{sorted(missing)} and has {sorted(result.unexpected_keys)} besides"
        )


def _names(module: nn.Module) -> set[str]:
    """Of the frozen parameters; tied ones under each of their names."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
