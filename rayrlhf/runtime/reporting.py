"""Reports phases, steps and evaluations from rank 0 to the board actor, which the driver's sinks read."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from rayrlhf.observe.board import Posted, Poster, Receipt, Report
from rayrlhf.observe.metric_keys import check_keys
from rayrlhf.placement.reaper import NAMESPACE
from rayrlhf.samples import Sample

FLUSH_SECONDS = 30.0
RETRY_SECONDS = 0.2


class Reporter:
    """Posts reports asynchronously, so that a slow console does not delay training."""

    def __init__(self, board: str, rank: int) -> None:
        self.board = ray.get_actor(board, namespace=NAMESPACE) if rank == 0 else None
        self._poster = Poster()
        self._receipts: list[Any] = []  # in flight
        self._deaths_reported = 0

    def say(self, step: int, text: str) -> None:
        self._post(Report("phase", step, text))

    def event(self, step: int, text: str) -> None:
        self._post(Report("event", step, text))

    def failure(self, step: int, what_failed: str, reaction: str) -> None:
        self._post(Report("failure", step, what_failed, then=reaction))

    def warn(self, step: int, text: str) -> None:
        self._post(Report("warning", step, text))

    def evaluation(self, step: int, when: str, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
        self._post(Report("eval", step, when, metrics, rows))

    def step(self, step: int, metrics: dict[str, float], shown: Sequence[Sample]) -> None:
        check_keys(metrics)
        self._post(Report("step", step, metrics=metrics))
        self._post(Report("rollouts", step, rows=[_row(step, sample) for sample in shown]))

    def _post(self, report: Report) -> None:
        if self.board is None:
            return
        self._post_again(timeout_seconds=0.0)
        if self.board is None:
            return
        self._receipts.append(self.board.post.remote(self._poster.number(report)))

    def flush(self) -> None:
        """Wait until the board has received every report; those lost with its process are posted again."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._receipts and time.monotonic() < deadline:
            self._post_again(timeout_seconds=1.0)
            if self._receipts:
                time.sleep(RETRY_SECONDS)

    def _post_again(self, timeout_seconds: float) -> None:
        assert self.board is not None
        ready, self._receipts = ray.wait(
            self._receipts, num_returns=len(self._receipts), timeout=timeout_seconds
        ) if self._receipts else ([], [])  # fmt: skip
        try:
            lost = self._poster.handle_receipts([_receipt(ref) for ref in ready])
        except ActorDiedError:  # killed at the end of its run
            self.board, self._receipts = None, []
            return
        if self._poster.num_deaths > self._deaths_reported:
            self._deaths_reported = self._poster.num_deaths
            text = "the board's process died; reports that it had not passed on were posted again"
            step = lost[-1].report.step if lost else 0
            lost.append(self._poster.number(Report("warning", step, text)))
        self._receipts += [self.board.post.remote(posted) for posted in lost]


def _receipt(ref: Any) -> Receipt | None:
    """The board's receipt; None if its process died before answering."""
    try:
        return ray.get(ref)
    except ActorUnavailableError:
        return None


class ToBoard:
    """Posts console lines from any process of the run. Lines that are lost with the board's process are not
    posted again, because they are also in a log.
    """

    def __init__(self, board: str) -> None:
        self.board = board
        self._actor: Any = None
        self._name = ""
        self._number = 0

    def __call__(self, text: str) -> None:
        if self._actor is None:  # looked up in the process that this object was sent to
            self._actor = ray.get_actor(self.board, namespace=NAMESPACE)
            self._name = uuid.uuid4().hex
        self._number += 1
        self._actor.post.remote(Posted(self._name, self._number, Report("note", 0, text)))


def _row(step: int, sample: Sample) -> dict[str, Any]:
    return {
        "step": step,
        "group": sample.group_id,
        "row_id": sample.prompt.row_id,
        "prompt": sample.prompt.prompt,
        "response": sample.response,
        "reward": sample.score,
        "policy_version": sample.policy_version,
        "newest_policy_version": sample.newest_policy_version,
        "truncated": sample.truncated,
        "turns": sample.num_turns,
        "failure": sample.failure,
    }
