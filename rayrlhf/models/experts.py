"""Routers of mixture-of-experts layers: records or replays which experts each token is sent to.

transformers' layers call `experts(hidden, chosen, weights)` with what a sibling router returned, under names
and in orders of their own; they are found by that structure, and `router_probe` tests on a small copy
whether an architecture is understood.

In addition to the legend of `rayrlhf.batch`: L  mixture-of-experts layers      E  experts of a layer
K  experts of a token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Scoring = Literal["softmax", "sigmoid"]  # of router logits, from which experts are chosen and weighted


class MoeLayer(NamedTuple):
    """A layer's router and experts, e.g. Mixtral's `model.layers.0.mlp.gate` and `….experts`."""

    name: str  # of the module that holds both
    router: nn.Module
    experts: nn.Module


class Routed(NamedTuple):
    """What one layer's router decided for the N rows of a forward pass."""

    logits: Tensor  # [N, E], with gradient
    chosen: Tensor  # [N, K] int64
    weights: Tensor  # [N, K]


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The mixture-of-experts layers, in order; empty for a dense model."""
    found = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or isinstance(experts, nn.ModuleList):
            continue
        router = _router_of(block)
        if router is not None:
            found.append(MoeLayer(name, router, experts))
    return found


def _router_of(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    return children.get("router") or children.get("gate")


def num_experts_of(layer: MoeLayer) -> int:
    """E, from the router's weight [E, H], which ZeRO-3 may have partitioned."""
    shapes = (getattr(p, "ds_shape", p.shape) for p in layer.router.parameters())
    return next(shape[0] for shape in shapes if len(shape) == 2)


class Recorder:
    """Collects the decisions of all layers; a forward pass may consist of several calls of each layer."""

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self._logits: list[list[Tensor]] = [[] for _ in layers]
        self._chosen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def routed(self) -> list[Routed]:
        """One per layer, over the rows of all calls."""
        return [
            Routed(torch.cat(logits), torch.cat([c for c, _ in pairs]), torch.cat([w for _, w in pairs]))
            for logits, pairs in zip(self._logits, self._chosen, strict=True)
        ]

    def on_router(self, index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._logits[index].append(_logits_of(output))

        return hook

    def on_experts(self, index: int) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> None:
            _hidden, *rest = inputs
            chosen = next(each for each in rest if not each.is_floating_point())
            weights = next(each for each in rest if each.is_floating_point())
            self._chosen[index].append((chosen, weights))

        return hook


def _logits_of(output: Any) -> Tensor:
    """A router returns logits, or a tuple with them, weights and indices in any order."""
    if isinstance(output, Tensor):
        return output.flatten(0, -2)
    floats = [each for each in output if isinstance(each, Tensor) and each.is_floating_point()]
    widest = max(each.size(-1) for each in floats)
    return next(each for each in floats if each.size(-1) == widest).flatten(0, -2)


@contextmanager
def recorded(layers: Sequence[MoeLayer]) -> Iterator[Recorder]:
    """Records the forward passes inside the context, without any operation on their tensors."""
    recorder = Recorder(layers)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.router.register_forward_hook(recorder.on_router(index)).remove)
            stack.callback(layer.experts.register_forward_pre_hook(recorder.on_experts(index)).remove)
        yield recorder


def scores_of(logits: Tensor, scoring: Scoring) -> Tensor:
    """Routing probabilities [N, E] in the precision of the logits, at least fp32; each row sums to 1.

    Sigmoid scores are divided by their sum, as in DeepSeek-V3's balance loss (arXiv 2412.19437, eq. 19).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if scoring == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


class _Forced(TorchFunctionMode):
    """Inside, a router's choice of experts (top K of E scores per row) is the given one."""

    def __init__(self, chosen: Tensor, num_experts: int) -> None:
        super().__init__()
        self.chosen = chosen  # [N, K]; rows of -1: the router chooses
        self.num_experts = num_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk) and self._is_the_choice(*args, **kwargs):
            own = func(*args, **kwargs).indices
            chosen = torch.where(self.chosen < 0, own, self.chosen)
            return torch.return_types.topk((args[0].gather(-1, chosen), chosen))
        return func(*args, **kwargs)

    def _is_the_choice(self, scores: Tensor, k: int | None = None, *_: Any, **kwargs: Any) -> bool:
        """Groups of experts are chosen by `topk` too, from tensors of other shapes."""
        return scores.shape[1:] == (self.num_experts,) and (k or kwargs.get("k")) == self.chosen.size(-1)


class Replay:
    """Makes routers send each token to given experts, also where activations are recomputed."""

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self._chosen: list[Tensor | None] = [None] * len(layers)
        for index, layer in enumerate(layers):
            layer.router.forward = self._forced(index, layer.router.forward, num_experts_of(layer))

    def _forced(self, index: int, forward: Any, num_experts: int) -> Any:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            chosen = self._chosen[index]
            if chosen is None:
                return forward(*args, **kwargs)
            with _Forced(chosen, num_experts):
                return forward(*args, **kwargs)

        return replayed

    def set(self, chosen: Tensor | None) -> None:
        """[N, L, K] for the forward and backward passes that follow; None, or -1: routers choose.

        Raises:
            ValueError: if it has another number of layers than the model.
        """
        if chosen is None:
            self._chosen = [None] * len(self._chosen)
            return
        if chosen.size(1) != len(self._chosen):
            raise ValueError(
                f"the engine routes in {chosen.size(1)} layers, the trainer's model in {len(self._chosen)}"
            )
        self._chosen = list(chosen.long().unbind(1))
