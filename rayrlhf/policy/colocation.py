"""Colocated mode: trainer and engines time-share GPU memory; engines sleep while models are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from rayrlhf.train.collectives import Ranks
from rayrlhf.weights.sync import WeightSync

Pushed = TypeVar("Pushed")


class Offloaded(Protocol):
    """A model that can leave the device."""

    def offload(self) -> None: ...

    def reload(self) -> None: ...


class Colocation:
    """Who has the memory. Every method is collective; where engines do not sleep, they do nothing around the
    push.
    """

    def __init__(self, weights: WeightSync, ranks: Ranks, *, engines_sleep: bool) -> None:
        self.weights = weights
        self.ranks = ranks
        self.engines_sleep = engines_sleep
        self.trainer_has_memory = False
        self.freed_bytes = 0  # by the engines that rank 0 has last put to sleep

    def before_loading(self) -> None:
        """Models are loaded while engines sleep. On a CPU both sides come up at once: there is room."""
        if self.engines_sleep and self.ranks.device.type == "cuda":
            self._put_engines_to_sleep()

    def start_training(self, *models: Offloaded | None) -> None:
        """Engines go to sleep, then what the trainer has offloaded comes back."""
        if self.trainer_has_memory:
            return
        self._put_engines_to_sleep()
        for model in models:
            if model is not None:
                model.reload()
        self.weights.record("optimizer and gradients are back")

    def start_rollouts(self, push: Callable[[], Pushed], *models: Offloaded | None) -> Pushed:
        """The trainer keeps its weights alone; engines wake for these, and then for their cache."""
        if not self.engines_sleep:
            return push()
        for model in models:
            if model is not None:
                model.offload()
        self.weights.record("optimizer and gradients are put aside")
        self.ranks.barrier()
        self.weights.engines_wake("weights")
        pushed = push()
        self.weights.engines_wake("kv_cache")
        self.trainer_has_memory = False
        return pushed

    def _put_engines_to_sleep(self) -> None:
        self.freed_bytes = self.weights.engines_sleep()
        self.trainer_has_memory = True
        self.ranks.barrier()  # the engine on their GPU sleeps when rank 0 says so
