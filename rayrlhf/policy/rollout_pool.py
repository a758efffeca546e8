"""Asynchronous rollouts: a pool of groups in flight, none older than `rollout.max_staleness` allows.

Weights are updated in the middle of responses: engines pause, keep their tokens and continue, so a sample may
have several policy versions. With `max_staleness: 0` nothing is in flight while the workers train, and the
results equal those of `rollouts.RolloutsOnDemand`.
"""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rayrlhf.policy.prompt_queue import Numbered, PromptQueue
from rayrlhf.policy.rollouts import OnGroup
from rayrlhf.rollout.background import Background
from rayrlhf.samples import Sample

# (prompt, minimum policy version at the start) -> its samples with raw rewards
CollectGroup = Callable[[Numbered, int], Coroutine[Any, Any, list[Sample]]]


@dataclass
class InFlight:
    prompt: Numbered
    version: int  # policy version at the start; the first tokens are of this version or a newer one
    samples: Future[list[Sample]]


class RolloutPool:
    """This rank's groups in flight.

    A group that is started at version v is trained on at version v + max_staleness at the latest. It
    continues across weight updates: engines keep its tokens and continue with the new weights. Without
    oversampling, groups are taken in the order of their prompts. With oversampling, the first to finish are
    taken and the others stay in flight; those that become too old are restarted.
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
        total_steps: int,
        timeout_seconds: float,
        on_group: OnGroup = lambda done: None,
    ) -> None:
        """`total_steps`: of the run; the last steps start no group that would not be trained on."""
        self.prompts = prompts
        self.collect_group = collect_group
        self.background = background
        self.per_step = per_step
        self.max_staleness = max_staleness
        self.oversampling = oversampling
        self.in_order = oversampling == 1.0
        self.capacity = math.ceil(per_step * (max_staleness + oversampling))
        self.total_steps = total_steps
        self.timeout_seconds = timeout_seconds
        self.on_group = on_group
        self.in_flight: list[InFlight] = []  # in start order
        self.restarted = 0  # groups restarted since the last `drain_restarted`

    def next(self, step: int) -> list[Sample]:
        """Fill the pool, then wait for `per_step` groups; returns their samples in order of group id.

        Raises:
            TimeoutError: if no group finishes within `timeout_seconds`.
        """
        self._restart_stale(step)
        useful = math.ceil((self.total_steps - step) * self.per_step * self.oversampling)
        missing = min(self.capacity, useful) - len(self.in_flight)
        for prompt in self.prompts.take(max(0, missing)):
            samples = self.background.start(self.collect_group(prompt, step))
            self.in_flight.append(InFlight(prompt, step, samples))
        return self._take()

    def _take(self) -> list[Sample]:
        deadline = time.monotonic() + self.timeout_seconds
        while len(taken := self._ready()) < self.per_step:
            self.on_group(len(taken))
            self._wait_for_one(deadline)
        taken = taken[: self.per_step]
        self.in_flight = [group for group in self.in_flight if group not in taken]
        taken.sort(key=lambda group: group.prompt[0])
        self.prompts.finish(group.prompt[0] for group in taken)
        return [sample for group in taken for sample in group.samples.result()]

    def _ready(self) -> list[InFlight]:
        """Groups that can be taken now; without oversampling, only once all earlier groups have finished."""
        if not self.in_order:
            return [group for group in self.in_flight if group.samples.done()]
        first = self.in_flight[: self.per_step]
        return first if all(group.samples.done() for group in first) else []

    def _wait_for_one(self, deadline: float) -> None:
        """Return when another group may have finished."""
        waited_for = self.in_flight[: self.per_step] if self.in_order else self.in_flight
        running = [group for group in waited_for if not group.samples.done()]
        if not running:
            return  # they have finished meanwhile
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
