"""Reports in one line which training worker failed, in which phase, and how Ray Train reacts."""

from __future__ import annotations

import re
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from rayrlhf.runtime.reporting import Reporter
from rayrlhf.untrusted_text import last_line

ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours the tracebacks of other processes


class WorkerFailures(UserCallback):
    """Callback in Ray Train's controller, because a killed worker cannot report its own death."""

    def __init__(self, board: str, *, role: str, max_failures: int, saved_step: int) -> None:
        self.board = board
        self.role = role
        self.max_failures = max_failures
        self.saved_step = saved_step  # of the newest checkpoint
        self.num_failures = 0  # that train.max_failures counts
        self.preempted: set[str] = set()  # actors whose nodes were taken away after a notice

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is not None:
            self.saved_step = metrics[0].get("step", self.saved_step)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        preempted = {
            actor for actor in map(_preempted_actor, worker_exceptions.values()) if actor is not None
        }
        if preempted and preempted <= self.preempted:
            return  # until the deadline of the notice, each look at the workers finds them again
        self.preempted |= preempted
        self.num_failures += not preempted
        reporter = Reporter(self.board, rank=0)
        then = self.reaction(preempted=bool(preempted))
        reporter.failure(self.saved_step, self.failed_workers(worker_exceptions), then)
        reporter.flush()  # the controller may end the run next

    def failed_workers(self, failures: dict[int, Exception]) -> str:
        """The workers that died; if none did, the first one with an error. When a worker dies, the others
        fail as a consequence.
        """
        died = {rank: error for rank, error in failures.items() if _is_death(error)}
        if died:
            ranks = ", ".join(map(str, sorted(died)))
            workers = "worker" if len(died) == 1 else "workers"
            return f"{self.role} {workers} {ranks} died ({_cause(died[min(died)])})"
        rank = min(failures)
        return f"{self.role} worker {rank} failed ({_cause(failures[rank])})"

    def reaction(self, *, preempted: bool = False) -> str:
        """`preempted`: Ray Train waits for the deadline of the notice, and restarts as often as needed."""
        start = f"from step {self.saved_step}" if self.saved_step else "from the beginning, nothing was saved"
        if preempted:
            return (
                f"after the deadline of its notice the workers start again {start} "
                "(train.max_failures counts only other failures)"
            )
        if self.num_failures > self.max_failures:
            return f"the run ends: train.max_failures={self.max_failures} restarts are used up"
        count = f"restart {self.num_failures} of train.max_failures={self.max_failures}"
        return f"the workers start again {start} ({count})"


def _is_death(error: Exception) -> bool:
    return isinstance(error, WorkerHealthCheckFailedError) and isinstance(
        error.health_check_failure, RayActorError
    )


def _preempted_actor(error: Exception) -> str | None:
    """Id of the worker's actor if it died because its node was taken away after a notice."""
    death = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else None
    return f"{death.actor_id}" if isinstance(death, RayActorError) and death.preempted else None


def _cause(error: Exception) -> str:
    if _preempted_actor(error) is not None:
        return "its node was taken away"
    if isinstance(error, WorkerHealthCheckFailedError):
        text = str(error.health_check_failure)
        if "its node has died" in text or "node was terminated" in text:
            return "its node was lost"
        if "running low on memory" in text:
            return "Ray ended it: the node was running low on memory"
        return "its process was killed or crashed; out of host memory is the usual reason"
    if isinstance(error, UserExceptionWithTraceback):
        error = error._base_exc  # pyright: ignore[reportAssignmentType]
    text = ESCAPE_CODES.sub("", last_line(str(error) or repr(error)))
    name = type(error).__name__
    return text if text.startswith(name) or name.startswith("RayTaskError") else f"{name}: {text}"
