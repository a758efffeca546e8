"""The hybrid engine: engines and trainers that share slots have their memory by turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rayrlhf.policy.actor_critic import Learners
from rayrlhf.train import collectives
from rayrlhf.weights.sync import WeightSync

Pushed = TypeVar("Pushed")


class Turns:
    """Every method is collective; where engines do not sleep, they do nothing around the push."""

    def __init__(self, sync: WeightSync, *, engines_sleep: bool) -> None:
        self.sync = sync
        self.engines_sleep = engines_sleep
        self.is_trainers_turn = False
        self.freed_bytes = 0  # by the engines that rank 0 has last put to sleep

    def before_loading(self) -> None:
        """Models are loaded in the trainers' turn. On a CPU both sides come up at once: there is room."""
        if self.engines_sleep and collectives.device().type == "cuda":
            self._put_engines_to_sleep()

    def train(self, learners: Learners) -> None:
        """Engines go to sleep, then what the trainers had put aside comes back."""
        if self.is_trainers_turn:
            return
        self._put_engines_to_sleep()
        learners.reload()
        self.sync.record("optimizer and gradients are back")

    def roll_out(self, learners: Learners, push: Callable[[], Pushed]) -> Pushed:
        """The trainers keep their weights alone; engines wake for these, and then for their cache."""
        if not self.engines_sleep:
            return push()
        learners.offload()
        self.sync.record("optimizer and gradients are put aside")
        _all_ranks_have_come()
        self.sync.engines_wake("weights")
        pushed = push()
        self.sync.engines_wake("kv_cache")
        self.is_trainers_turn = False
        return pushed

    def _put_engines_to_sleep(self) -> None:
        self.freed_bytes = self.sync.engines_sleep()
        self.is_trainers_turn = True
        _all_ranks_have_come()  # the engine on their GPU sleeps when rank 0 says so


def _all_ranks_have_come() -> None:
    collectives.max_over_ranks(0.0)
