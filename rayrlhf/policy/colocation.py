"""Colocated mode: trainer and engines time-share GPU memory; engines sleep while models are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from rayrlhf.train.collectives import Ranks
from rayrlhf.train.device_memory import release_cached_memory
from rayrlhf.weights.sync import WeightSync

Pushed = TypeVar("Pushed")


class Offloaded(Protocol):
    """A model whose states can be offloaded from the device."""

    def offload(self) -> None: ...

    def offload_weights(self) -> None: ...

    def reload(self) -> None: ...


class Colocation:
    """Alternates GPU memory between trainer and engines. Every method is collective; without
    `engines_sleep` nothing happens except the push.
    """

    def __init__(
        self,
        weights: WeightSync,
        ranks: Ranks,
        *,
        engines_sleep: bool,
        on_gpu: bool,
        offload_weights: bool = False,
    ) -> None:
        """`offload_weights`: during rollouts the trainers' weights are in host memory, too."""
        self.weights = weights
        self.ranks = ranks
        self.engines_sleep = engines_sleep
        self.on_gpu = on_gpu
        self.offload_weights = offload_weights
        self.weights_are_on_host = False
        self.trainer_has_memory = False
        self.freed_bytes = 0  # by the engines, when rank 0 last put them to sleep

    def before_loading(self) -> None:
        """Put engines to sleep while models are loaded, after those that are starting are up. On a CPU both
        are loaded at once: memory suffices.
        """
        if self.engines_sleep and self.on_gpu:
            self._put_engines_to_sleep()

    def start_training(self, *models: Offloaded | None) -> None:
        """Put the engines to sleep, then reload what the trainer has offloaded."""
        if self.trainer_has_memory:
            return
        self._put_engines_to_sleep()
        with self.weights.unread():
            for model in models:
                if model is not None:
                    model.reload()
        self.weights_are_on_host = False
        self.weights.record("optimizer and gradients reloaded")

    def start_rollouts(self, push: Callable[[], Pushed], *models: Offloaded | None) -> Pushed:
        """Offload the trainer's states except its weights, wake the engines' weights, push, offload the
        trainer's weights if they are to be, and wake the engines' KV cache.
        """
        if not self.engines_sleep:
            return push()
        if self.weights_are_on_host:  # after a step in which nothing was trained
            self.start_training(*models)
        for model in models:
            if model is not None:
                model.offload()
        self.weights.record("optimizer and gradients offloaded")
        self.ranks.barrier()
        self.weights.engines_wake("weights")
        pushed = push()
        if self.offload_weights:
            with self.weights.unread():
                for model in models:
                    if model is not None:
                        model.offload_weights()
            self.weights_are_on_host = True
            self.weights.record("weights offloaded")
        # The push has gathered parameters and filled buckets. The engines' cache is mapped at fixed addresses
        # and needs all of its memory at once.
        release_cached_memory()
        self.ranks.barrier()
        self.weights.engines_wake("kv_cache")
        self.trainer_has_memory = False
        return pushed

    def _put_engines_to_sleep(self) -> None:
        self.freed_bytes = self.weights.engines_sleep()
        self.trainer_has_memory = True
        self.ranks.barrier()  # only rank 0 puts the engines to sleep
