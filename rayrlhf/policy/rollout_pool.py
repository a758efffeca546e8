"""Rollouts that run ahead of training: a pool of groups in flight, none older than `max_staleness` allows."""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rayrlhf.policy.prompt_queue import PromptQueue
from rayrlhf.policy.rollouts import Numbered
from rayrlhf.rollout.background import Background
from rayrlhf.samples import Sample

# (prompt, version to begin with at least) -> its samples with raw rewards
CollectGroup = Callable[[Numbered, int], Coroutine[Any, Any, list[Sample]]]


@dataclass
class InFlight:
    prompt: Numbered
    version: int  # the policy when it was started; its first tokens are of this version or a newer one
    samples: Future[list[Sample]]


class RolloutsAhead:
    """This rank's groups in flight.

    A group that is started at version v is trained on at version v + max_staleness at the latest. It goes on
    over weight updates: engines keep its tokens and continue with the new weights. Without oversampling
    groups are taken in the order of their prompts, and `max_staleness` 0 is the synchronous loop. With
    oversampling the first to finish are taken and the others stay in flight; one that gets too old by that
    is started anew.
    """

    def __init__(
        self,
        prompts: PromptQueue,
        collect_group: CollectGroup,
        background: Background,
        *,
        per_step: int,
        max_staleness: int,
        oversampling: float,
        timeout_seconds: float,
    ) -> None:
        self.prompts = prompts
        self.collect_group = collect_group
        self.background = background
        self.per_step = per_step
        self.max_staleness = max_staleness
        self.oversampling = oversampling
        self.in_order = oversampling == 1.0
        self.capacity = math.ceil(per_step * (max_staleness + oversampling))
        self.timeout_seconds = timeout_seconds
        self.in_flight: list[InFlight] = []  # in the order of their start
        self.restarted = 0  # groups started anew since the last `drain_restarted`

    def draw(
        self, version: int, remaining_steps: int, on_group: Callable[[int], None] = lambda done: None
    ) -> list[Sample]:
        """The samples of `per_step` groups, by group id, with the pool filled up before. Waits for them.

        `remaining_steps`, this one included, keeps the last steps from starting what nobody will train on.
        Raises `TimeoutError`.
        """
        self._restart_stale(version)
        useful = math.ceil(remaining_steps * self.per_step * self.oversampling)
        missing = min(self.capacity, useful) - len(self.in_flight)
        for prompt in self.prompts.take(max(0, missing)):
            samples = self.background.start(self.collect_group(prompt, version))
            self.in_flight.append(InFlight(prompt, version, samples))
        return self._take(on_group)

    def _take(self, on_group: Callable[[int], None]) -> list[Sample]:
        deadline = time.monotonic() + self.timeout_seconds
        while len(taken := self._ready()) < self.per_step:
            on_group(len(taken))
            self._wait_for_one(deadline)
        taken = taken[: self.per_step]
        self.in_flight = [group for group in self.in_flight if group not in taken]
        taken.sort(key=lambda group: group.prompt[0])
        self.prompts.finish(group.prompt[0] for group in taken)
        return [sample for group in taken for sample in group.samples.result()]

    def _ready(self) -> list[InFlight]:
        """Groups that may be taken now. In order, one that is finished still waits for those before it."""
        if not self.in_order:
            return [group for group in self.in_flight if group.samples.done()]
        first = self.in_flight[: self.per_step]
        return first if all(group.samples.done() for group in first) else []

    def _wait_for_one(self, deadline: float) -> None:
        """Return when another group may have finished."""
        waited_for = self.in_flight[: self.per_step] if self.in_order else self.in_flight
        running = [group for group in waited_for if not group.samples.done()]
        if not running:
            return  # they finished just now
        left = max(0.0, deadline - time.monotonic())
        futures = [group.samples for group in running]
        if not concurrent.futures.wait(futures, left, concurrent.futures.FIRST_COMPLETED).done:
            ids = [group.prompt[0] for group in running]
            raise TimeoutError(
                f"no group finished within rollout.timeout_seconds={self.timeout_seconds:g}; "
                f"waiting for groups {ids[:5]}"
            )

    def _restart_stale(self, version: int) -> None:
        stale = [group for group in self.in_flight if version - group.version > self.max_staleness]
        for group in stale:
            group.samples.cancel()
        self.in_flight = [group for group in self.in_flight if group not in stale]
        self.prompts.put_back([group.prompt for group in stale])
        self.restarted += len(stale)

    def drain_restarted(self) -> int:
        restarted, self.restarted = self.restarted, 0
        return restarted

    def close(self) -> None:
        for group in self.in_flight:
            group.samples.cancel()
